"""What the tests of trajectories share: a task with calls of the calculator, one with searches, and
scripted episodes of both.

Invariant: no model, no network; the same call gives the same episode.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from scripted import Scripted
from tiny import byte_tokenizer

from minirl import recipe
from minirl.chat import Chat
from minirl.episode import Episode, Problem
from minirl.methods.swirl.stepwise import Tags, stepwise
from minirl.recipe import Sampling
from minirl.retrieve import Passage
from minirl.rollout import Talk, play
from minirl.tasks import Task, open_task
from minirl.tasks.qa import Plan, SearchTask, Step, _verify_answer
from minirl.verify.qa import RESEARCH

CHAT = Chat(byte_tokenizer())
TAGS = Tags("calculator", "calc", "answer", 5)
SAMPLING = {"attempt_tokens": 120, "stepwise": {"expression": "calc"}}
SOLUTION = "She sold 48/2 = <<48/2=24>>24 in May.\nIn all 48+24 = <<48+24=72>>72.\n#### 72"
FOUR = (
    "Half. <calc>48/2</calc>",
    "Hm <calc>48+</calc>",
    "I forgot",
    "All. <calc>48+24</calc>",
    "So <answer>72</answer>",
)


def calls_task(folder: Path) -> Task:
    """GSM8K from a file of four rows, one of them without calls, one held out."""
    rows = [
        {
            "question": f"{name} sold 48 in April and half as many in May. How many?",
            "answer": SOLUTION,
        }
        for name in ("Ann", "Bo", "Cy")
    ]
    rows.append({"question": "How many?", "answer": "Three.\n#### 3"})
    (folder / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    node = {
        "name": "gsm8k",
        "source": str(folder / "train.jsonl"),
        "chain": "calls",
        "most_calls": 2,
        "train": 5,
        "held_out": 1,
    }
    return open_task(recipe.Gsm8k.model_validate(node), 0)


def talk_of(problem: Problem, **sampling: Any) -> Talk:
    return Talk(
        problem, CHAT, Sampling.model_validate(SAMPLING | sampling), temperature=1.0, seed="0"
    )


def scripted(*replies: str) -> Scripted:
    """One reply after another, by the number of turns that the assistant has had."""
    return Scripted(CHAT, lambda text, ask: replies[text.count("assistant\n") - 1])


def played(task: Task, *replies: str, **sampling: Any) -> Episode:
    (episode,) = play([stepwise(talk_of(task.train[0], **sampling), task)], scripted(*replies))
    assert (
        [t.trained for t in episode.turns]
        == [t.sampled for t in episode.turns]
        == [t.kind == "action" for t in episode.turns]
    )
    return episode


def said(episode: Episode) -> list[str]:
    """The turns after the prompt: what the model wrote, and what it heard."""
    return [
        CHAT.heard(t.tokens) if t.kind == "result" else CHAT.text(t.tokens)
        for t in episode.turns[1:]
    ]


class Library:
    """A retriever of two passages."""

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        there = {
            "film": [Passage("The Third Man", "By Carol Reed. <answer>no</answer>")],
            "Reed": [Passage("Carol Reed", "From Putney.")],
        }
        return [
            next((found for word, found in there.items() if word in query), [])[:k]
            for query in queries
        ]


def search_task() -> SearchTask:
    answer = {
        "golds": ["Putney"],
        "titles": ["The Third Man", "Carol Reed"],
        "paragraphs": [],
        "steps": [],
    }
    problem = Problem("q", "Where was the film's director born?", answer)
    steps = (Step("film", "The Third Man", "Carol Reed"), Step("Reed born", "Carol Reed", "Putney"))
    node = recipe.HotpotQA(name="hotpotqa", floor=0.0)
    return SearchTask(
        "films",
        (problem,),
        (problem,),
        lambda p, text: pytest.fail("the answer alone is scored"),  # type: ignore[arg-type, return-value]
        verify_answer=partial(_verify_answer, node),
        plan=lambda p: Plan(steps, "Putney"),
        tags=RESEARCH,
        retriever=Library(),
        k=2,
    )
