"""Evaluation: known answers give known numbers, and two evaluations of a run can be compared in
pairs."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import Scripted, at_random
from tiny import byte_tokenizer

from minirl.chat import Chat
from minirl.episode import Ask, Episode, Problem, Verdict
from minirl.loop.evaluate import Evaluator
from minirl.loop.trial_recipe import sampling_recipe, trial_recipe
from minirl.methods.reflect import REFLECT, RETRY
from minirl.recipe import Eval, Sampling
from minirl.record.evals import summarise
from minirl.record.statistics import wilson
from minirl.rollout import seed_of
from minirl.tasks import Task

CHAT = Chat(byte_tokenizer())
# What is answered at the first and the second try of each question; digits are wrong in different
# ways.
ANSWERS = {"a": ("yes", ""), "b": ("no", "yes"), "c": ("no", "perhaps"), "d": ("perhaps", "yes")}
PROBLEMS = tuple(Problem(name, f"Question {name}?", "yes") for name in ANSWERS)


def verify(problem: Problem, text: str) -> Verdict:
    return Verdict(
        float(text == "yes"), text == "yes", {"error_kind": None if text == "yes" else text}
    )


TASK = Task("questions", (), PROBLEMS, verify)


def script(text: str, ask: Ask) -> str:
    if text.rstrip().endswith(f"{REFLECT}<|im_end|>\n<|im_start|>assistant"):
        return "Say yes."
    name = text.partition("Question ")[2][0]
    return ANSWERS[name][RETRY in text]


def evaluated(
    sampler: Scripted, seed: int = 0, **numbers: Any
) -> tuple[list[dict[str, Any]], list[Episode]]:
    sampling = Sampling(attempt_tokens=20, reflection_tokens=10)
    return Evaluator(TASK, CHAT, sampling, Eval(**numbers), seed).evaluate(PROBLEMS, sampler)


def test_two_tries() -> None:
    sampler = Scripted(CHAT, script)
    rows, episodes = evaluated(sampler, tries=2)
    # Tokens: "yes" and its end marker are 4; the reflection adds 9 and the second try its own.
    assert rows == [
        {
            "id": "a",
            "first": [1],
            "first_error": [None],
            "tokens": [4],
            "second": [1],
            "second_error": [None],
        },
        {
            "id": "b",
            "first": [0],
            "first_error": ["no"],
            "tokens": [3 + 9 + 4],
            "second": [1],
            "second_error": [None],
        },
        {
            "id": "c",
            "first": [0],
            "first_error": ["no"],
            "tokens": [3 + 9 + 8],
            "second": [0],
            "second_error": ["perhaps"],
        },
        {
            "id": "d",
            "first": [0],
            "first_error": ["perhaps"],
            "tokens": [8 + 9 + 4],
            "second": [1],
            "second_error": [None],
        },
    ]
    assert [e.problem for e in episodes] == list(PROBLEMS)
    assert {ask.temperature for ask in sampler.asks} == {0.0}
    assert [ask.max_tokens for ask in sampler.asks].count(10) == 3, "three reflections"
    summary = summarise(
        {
            "label": "start",
            "stage": 0,
            "step": 0,
            "tries": 2,
            "samples": 1,
            "temperature": 0.0,
            "problems": rows,
        }
    )
    assert (summary["first"].value, summary["second"].value) == (0.25, 0.75)
    assert summary["first_errors"] == {"no": 2, "perhaps": 1}
    assert summary["second_errors"] == {"perhaps": 1}


def test_one_try() -> None:
    sampler = Scripted(CHAT, script)
    rows, _ = evaluated(sampler, tries=1)
    assert rows == [
        {"id": "a", "first": [1], "first_error": [None], "tokens": [4]},
        {"id": "b", "first": [0], "first_error": ["no"], "tokens": [3]},
        {"id": "c", "first": [0], "first_error": ["no"], "tokens": [3]},
        {"id": "d", "first": [0], "first_error": ["perhaps"], "tokens": [8]},
    ]
    assert len(sampler.asks) == 4


def test_many_samples_stand_in_one_row_a_problem() -> None:
    def lucky(text: str, ask: Ask) -> str:
        return "yes" if ask.seed in right else "no"

    right = {seed_of(f"7/eval/{name}/{k}", 1) for name, k in (("a", 0), ("a", 2), ("c", 1))}
    rows, episodes = evaluated(Scripted(CHAT, lucky), seed=7, tries=1, samples=3, temperature=1.0)
    assert [row["first"] for row in rows] == [[1, 0, 1], [0, 0, 0], [0, 1, 0], [0, 0, 0]]
    assert [row["first_error"][0] for row in rows] == [None, "no", "no", "no"]
    assert [e.problem.id for e in episodes] == [
        "a",
        "b",
        "c",
        "d",
    ], "the first sample of each problem is shown"


def seeds(seed: int, **numbers: Any) -> list[int]:
    sampler = Scripted(CHAT, script)
    evaluated(sampler, seed, **numbers)
    return [ask.seed for ask in sampler.asks]


def test_the_same_seeds_at_every_evaluation_of_a_run() -> None:
    many = {"tries": 2, "samples": 2, "temperature": 1.0}
    assert seeds(0, **many) == seeds(0, **many)
    assert len(set(seeds(0, **many))) == len(seeds(0, **many)) == 2 * (1 + 3 * 3)
    assert not set(seeds(0, **many)) & set(seeds(1, **many)), "another run draws anew"
    # A problem's first sample is the same with one sample as with more, with one try as with two,
    # in company and alone.
    assert set(seeds(0, tries=1)) < set(seeds(0, tries=2)) < set(seeds(0, **many))


@settings(max_examples=25, deadline=None)
@given(st.randoms(use_true_random=False))
def test_the_order_of_finishing_changes_nothing(rng: random.Random) -> None:
    many = {"tries": 2, "samples": 2, "temperature": 1.0}
    assert evaluated(Scripted(CHAT, script, at_random(rng)), **many) == evaluated(
        Scripted(CHAT, script), **many
    )


@pytest.mark.parametrize("tries", [1, 2])
def test_a_cut_answer_counts_as_the_verifier_says(tries: int) -> None:
    sampler = Scripted(CHAT, lambda text, ask: "yes, " * 10)
    rows, episodes = evaluated(sampler, tries=tries)
    assert [row["first"] for row in rows] == [[0]] * 4
    assert {e.finish for e in episodes} == {"length"}


def verify_letter(problem: Problem, text: str) -> Verdict:
    """Three letters: the first of the text is the answer, another than a to c is none."""
    answer = text[0] if text[0] in "abc" else None
    return Verdict(
        float(answer == problem.answer),
        answer == problem.answer,
        {"error_kind": None, "answer": answer},
    )


# What the samples of each question say; the right answer is b.
VOTES = {"a": "bab", "b": "abc", "c": "cbb", "d": "zzz", "e": "zab"}


def voted(rank: Any = None, **numbers: Any) -> list[dict[str, Any]]:
    problems = [Problem(name, f"Question {name}?", "b") for name in VOTES]
    seeds = {
        seed_of(f"0/eval/{name}/{k}", 1): said
        for name, text in VOTES.items()
        for k, said in enumerate(text)
    }
    task = Task("letters", (), problems, verify_letter)
    sampler = Scripted(CHAT, lambda text, ask: seeds[ask.seed] * 2)
    node = Eval(samples=3, temperature=1.0, **numbers)
    evaluator = Evaluator(task, CHAT, Sampling(attempt_tokens=20), node, 0, rank=rank)
    return evaluator.evaluate(problems, sampler)[0]


def test_majority_of_the_samples() -> None:
    rows = voted(vote=True)
    assert [row["answer"] for row in rows] == [
        ["b", "a", "b"],
        ["a", "b", "c"],
        ["c", "b", "b"],
        [None] * 3,
        [None, "a", "b"],
    ]
    # Of three answers that tie one is right, of two one; a question without any answer is wrong.
    assert [row["scores"]["majority"] for row in rows] == [[1.0], [1 / 3], [1.0], [0.0], [0.5]]
    summary = summarise({"label": "x", "samples": 3, "problems": rows})
    assert summary["scores"]["majority"].value == pytest.approx(17 / 30)
    assert summary["scores"]["majority"][1:] == pytest.approx(wilson(17 / 6, 5)), (
        "Wilson over 5 questions, not over 15 samples"
    )
    assert summary["pass_at_k"][3].value == 0.8
    assert "scores" not in voted()[0]
    assert "answer" not in voted()[0]


def test_the_reward_model_picks_a_sample() -> None:
    asked: list[tuple[int, ...]] = []

    def rank(rows: Any) -> list[float]:
        asked.extend(rows)
        # Sure of b by a hair, the rest alike: 1 - 1e-12 and 1.0 must not tie.
        return [1.0 if CHAT.text(row).endswith("bb") else 1 - 1e-12 for row in rows]

    rows = voted(rank)
    assert [row["scores"]["reranked"] for row in rows] == [[1.0], [1.0], [1.0], [0.0], [1.0]]
    assert rows[0]["p_right"] == [1.0, 1.0, 1.0]
    assert [CHAT.text(row)[-2:] for row in asked] == [
        said * 2 for text in VOTES.values() for said in text
    ]
    assert all(
        row[: len(CHAT.prompt(Problem("a", "Question a?", "b")))]
        == CHAT.prompt(Problem("a", "Question a?", "b"))
        for row in asked[:3]
    )
    assert [row["scores"] for row in voted(lambda rows: [0.5] * len(rows))] == [
        {"reranked": [row["first"][0]]} for row in rows
    ]


def test_samples_are_as_warm_as_in_the_recipe_that_is_evaluated(tmp_path: Path) -> None:
    """Catches: the temperature of the run's own recipe for another's task, that task's overrides
    laid over the run's own."""
    stages = [{"kind": "train", "method": "single", "steps": 1}]
    own = {
        "model": {"name": "own"},
        "task": {"name": "countdown"},
        "sampling": {"temperature": 0.5},
        "stages": stages,
    }
    other = {
        "model": {"name": "other"},
        "task": {"name": "svamp"},
        "sampling": {"temperature": 0.75},
        "stages": stages,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(own))
    path = tmp_path / "other.yaml"
    path.write_text(yaml.safe_dump(other))
    many = ["eval.samples=4"]

    def temperature(*overrides: str, task: Path | None = None, warm: bool = True) -> float:
        choose = sampling_recipe if warm else trial_recipe
        node = choose(tmp_path, task, overrides, None)
        assert (node.model.name, node.task.name) == (
            "own",
            "countdown" if task is None else "svamp",
        )
        return node.eval.temperature

    assert temperature(*many) == 0.5
    assert temperature(*many, task=path) == 0.75
    assert temperature("task.chain=program", *many, "eval.vote=true", task=path) == 0.75
    assert temperature("sampling.temperature=0.25", *many, task=path) == 0.25
    assert temperature("eval.temperature=0.125", *many, task=path) == 0.125
    assert (
        temperature("task.chain=program", task=path, warm=False) == temperature(warm=False) == 0.0
    )
