"""stepwise: one action a turn, the tools' replies, demonstrations; and a trajectory split into
states that train one step each."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from stepping import (
    CHAT,
    FOUR,
    SAMPLING,
    TAGS,
    calls_task,
    played,
    said,
    scripted,
    search_task,
    talk_of,
)
from tiny import save_tiny

from minirl import recipe
from minirl.chat import Chat
from minirl.engine.learn.credit import advantages, is_dead
from minirl.engine.learn.learner import Learner
from minirl.engine.model import load as models
from minirl.engine.model.batch import collate, pack, row
from minirl.engine.model.policy import Policy
from minirl.engine.sample.live import LiveSampler
from minirl.episode import Episode, Group, Problem, Turn, regroup
from minirl.errors import UserError
from minirl.methods.swirl.demonstrate import demonstrate_stepwise
from minirl.methods.swirl.states import actions, imitations, some, states
from minirl.methods.swirl.stepwise import Action, imitate, read, step, tags_of
from minirl.recipe import Sampling
from minirl.rollout import Talk, play
from minirl.tasks import Task


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return calls_task(tmp_path_factory.mktemp("gsm8k"))


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("So <calc> 1+2 </calc>", Action("call", "1+2")),
        ("<answer>3</answer>", Action("answer", "3")),
        ("<answer>3</answer>.", Action("answer", "3")),
        ("<calc></calc>", Action("call", "")),
        ("Two <calc>1</calc> <answer>3</answer>", None),
        ("<answer><calc>1</calc></answer>", None),
        ("<calc>1<calc>2</calc>", None),
        ("<calc>1</answer>", None),
        ("</calc>1<calc>", None),
        ("<calc>1", None),
        ("It is 3.", None),
        ("<CALC>1</CALC>", None),
        ("<query>1</query>", None),
        ("", None),
    ],
)
def test_one_action_a_turn(text: str, action: Action | None) -> None:
    """Catches: a turn that does two things, the first or last of several tags taken for the
    action."""
    assert read(text, TAGS) == action


@given(st.text(alphabet="<>/calcnswer 12", max_size=60))
def test_reading_is_total(text: str) -> None:
    found = read(text, TAGS)
    assert found is None or text.count("<") >= 2


def test_calls_errors_and_the_answer(task: Task) -> None:
    episode = played(task, *FOUR)
    call, over = "<calc>...</calc>", "<answer>...</answer>"
    assert said(episode) == [
        *(
            FOUR[0],
            "48/2 -> 24",
            FOUR[1],
            "48+ -> error: not an expression: see to its operators and brackets",
        ),
        *(
            FOUR[2],
            f"That was not one action. Write either {call} or {over}, and nothing after it.",
        ),
        *(FOUR[3], "48+24 -> 72", FOUR[4]),
    ]
    assert episode.reward == 1.0
    assert episode.parts == {
        **{
            "first": True,
            "first_error": None,
            "steps": 5,
            "calls": 3,
            "errors": 1,
            "malformed": 1,
            "answered": True,
            "answer": "72",
        }
    }


def test_the_prompt_says_what_the_parser_reads(task: Task) -> None:
    prompt = CHAT.text(played(task, *FOUR).turns[0].tokens)
    assert "<calc>4 * 12</calc>" in prompt
    assert "at most 5 turns" in prompt
    assert task.train[0].prompt in prompt
    assert "The answer is" not in prompt, "that is what method single asks for"
    assert tags_of(task, recipe.Stepwise()).call == "math_exp"


def test_step_limit_and_answers(task: Task) -> None:
    """Catches: a tool's reply after the last action, a wrong answer that passes, an answer out of
    many words."""
    episode = played(task, *FOUR, stepwise={"expression": "calc", "steps": 2})
    assert [turn.kind for turn in episode.turns] == ["prompt", "action", "result", "action"]
    assert (episode.reward, episode.parts["answered"], episode.parts["first_error"]) == (
        0.0,
        False,
        "answer",
    )
    for answer, passed in (
        ("$72.00", True),
        ("72 clips", True),
        ("73", False),
        ("71 or 72", False),
        ("", False),
        ("not 72", False),
    ):
        assert played(task, f"<answer>{answer}</answer>").parts["first"] is passed, answer


def test_searches() -> None:
    task = search_task()
    look, again = (
        "I look. <search_query>the  film</search_query>",
        "<search_query>Reed</search_query>",
    )
    nothing = "<search_query>x</search_query>"
    episode = played(
        task, look, nothing, "<search_query> </search_query>", again, "<answer>putney</answer>"
    )
    assert said(episode)[1::2] == [
        "the film -> \nThe Third Man\nBy Carol Reed. <answer>no</answer>",
        "x -> Nothing was found.",
        "-> error: there is nothing between the tags",
        "Reed -> \nCarol Reed\nFrom Putney.",
    ]
    parts = {
        "first": True,
        "em": 1.0,
        "f1": 1.0,
        "recall": 1.0,
        "searches": 4,
        "calls": 4,
        "errors": 1,
        "steps": 5,
        "malformed": 0,
    }
    assert parts.items() <= episode.parts.items()
    assert played(task, "<answer>in Putney</answer>").reward == pytest.approx(2 / 3)
    assert played(task, "<answer>Rome</answer>").reward == 0.0


def test_results_are_cut() -> None:
    episode = played(
        search_task(), "<search_query>film</search_query>", "<answer>x</answer>", result_tokens=20
    )
    assert said(episode)[1] == "film -> \nThe Third Man\nBy Car"


def test_demonstrations_are_episodes_of_the_method(task: Task) -> None:
    """Catches: a demonstration whose turns a model's own would not be read as, or whose replies are
    not the tool's."""
    (shown,) = play([demonstrate_stepwise(talk_of(task.train[0]), task)], scripted())
    texts = [CHAT.text(turn.tokens) for turn in shown.turns if turn.trained]
    assert texts == [
        "She sold 48/2 <calc>48/2</calc>",
        "24 in May.\nIn all 48+24 <calc>48+24</calc>",
        "72. <answer>72</answer>",
    ]
    episode = played(task, *texts)
    assert said(episode) == said(shown)
    assert episode.reward == 1.0
    (shown,) = play(
        [demonstrate_stepwise(talk_of(search_task().train[0]), search_task())], scripted()
    )
    texts = [CHAT.text(turn.tokens) for turn in shown.turns if turn.trained]
    assert texts == [
        "I need to find: film <search_query>film</search_query>",
        (
            "This tells of Carol Reed. I need to find: Reed born <search_query>Reed"
            " born</search_query>"
        ),
        "This tells of Putney. Now I can answer. <answer>Putney</answer>",
    ]
    assert said(played(search_task(), *texts)) == said(shown)


def test_rows_that_cannot_be_shown(task: Task) -> None:
    assert {p.answer["value"] for p in (*task.train, *task.held_out)} == {"72"}
    assert any("have no chain: 1" in note for note in task.notes)
    with pytest.raises(UserError, match="no chain with calculator marks"):
        play([demonstrate_stepwise(talk_of(Problem("p", "q", {"value": "1"})), task)], scripted())
    other = Task("countdown", (), (), lambda p, text: pytest.fail("unused"))  # type: ignore[arg-type, return-value]
    with pytest.raises(UserError, match="'countdown' cannot be played step by step"):
        tags_of(other, recipe.Stepwise())


# --- states


def trajectory() -> Episode:
    """Four actions, written by hand."""
    problem = Problem("p", "q", {"value": "7"}, solution="s", system="sys")
    turns = [Turn("prompt", (1, 2, 3))]
    for n in range(4):
        turns.append(Turn("action", (10 + n, 20 + n), (-0.5, -0.25), trained=True))
        turns.append(Turn("result", (30 + n,)))
    return Episode(problem, tuple(turns[:-1]), 1.0, {"first": True})


def test_four_actions_are_four_states() -> None:
    """Catches: a context that holds its own action, lacks a reply, is trained, or was encoded
    again."""
    episode = trajectory()
    split = states([episode])
    assert [sum((t.tokens for t in p.context), ()) for p in split] == [
        (1, 2, 3),
        (1, 2, 3, 10, 20, 30),
        (1, 2, 3, 10, 20, 30, 11, 21, 31),
        (1, 2, 3, 10, 20, 30, 11, 21, 31, 12, 22, 32),
    ]
    assert all(
        episode.tokens[: len(c)] == c
        for c in (sum((t.tokens for t in p.context), ()) for p in split)
    )
    assert not any(turn.trained for p in split for turn in p.context)
    assert [p.id for p in split] == ["p#0.0", "p#0.1", "p#0.2", "p#0.3"]
    assert {(p.prompt, p.solution, p.system, p.answer["value"]) for p in split} == {
        ("q", "s", "sys", "7")
    }
    shown = imitations([episode])
    assert [[t.trained for t in p.context].count(True) for p in shown] == [1, 1, 1, 1]
    assert [p.context[-1] for p in shown] == [
        Turn("action", (10 + n, 20 + n), None, trained=True) for n in range(4)
    ]
    assert [p.context[:-1] for p in shown] == [p.context for p in split]
    assert actions(episode) == [1, 3, 5, 7]
    assert some(split, None, 0) == some(split, 9, 0) == split
    assert some(split, 2, 0) == some(split, 2, 0)
    assert {tuple(p.id for p in some(split, 2, seed)) for seed in range(20)} > {
        tuple(p.id for p in some(split, 2, 0))
    }


def test_a_state_is_stored_and_played(task: Task) -> None:
    """Catches: a prompt rendered again in front of a context, an action asked for elsewhere than at
    the state's end."""
    stored = Episode.from_json(json.loads(json.dumps(played(task, *FOUR).to_json())))
    (state,) = (p for p in states([stored]) if p.id.endswith(".2"))
    sampler = scripted("", "", "New. <calc>1+1</calc>")
    (episode,) = play([step(talk_of(state), task)], sampler)
    assert (
        sampler.asks[0].tokens
        == stored.tokens[: len(sampler.asks[0].tokens)]
        == sum((t.tokens for t in state.context), ())
    )
    assert sampler.asks[0].stop == ("</calc>", "</answer>")
    assert (episode.reward, episode.trained_tokens, episode.parts) == (
        None,
        21,
        {"malformed": 0, "answered": False},
    )
    assert [t.trained for t in episode.turns] == [False] * 5 + [True]
    (shown,) = play([imitate(talk_of(p), task) for p in imitations([stored])][:1], scripted())
    assert CHAT.text([t for t, m in zip(shown.tokens, shown.mask, strict=True) if m]) == FOUR[0]


@pytest.fixture
def opened(tmp_path: Path) -> tuple[Policy, Chat]:
    save_tiny(tmp_path)
    model = models.load_model(
        recipe.Model(name=str(tmp_path), dtype="fp32"), 0, torch.device("cpu")
    )
    return Policy(model.model, model.device, model.dtype), Chat(model.tokenizer)


def second_turn_group(policy: Policy, chat: Chat, task: Task) -> tuple[Group, LiveSampler]:
    """Eight new actions at the second state of a trajectory."""
    state = states([played(task, *FOUR)])[1]
    sampler = LiveSampler(policy, chat, rows=8)
    node = Sampling.model_validate(SAMPLING | {"attempt_tokens": 6})
    talks = [Talk(state, chat, node, temperature=1.0, seed=f"{k}") for k in range(8)]
    episodes = play([step(talk, task) for talk in talks], sampler)
    return regroup(episodes, 8)[0], sampler


def test_a_shared_state_is_computed_once(opened: tuple[Policy, Chat], task: Task) -> None:
    """The eight episodes of a second-turn group: their state is prefilled once, and stands once in
    the learner's batch."""
    policy, chat = opened
    group, sampler = second_turn_group(policy, chat, task)
    context = sum(len(t.tokens) for t in group.problem.context)
    assert sampler.runner.prefilled == context
    assert sampler.tokens == sum(e.trained_tokens for e in group.episodes)
    rows = [row(e, advantage=1.0, weight=1.0, number=n) for n, e in enumerate(group.episodes)]
    ((bundle,),) = pack(rows, 100_000)
    prefix = bundle.prefix
    assert context <= prefix < context + 6, "what the actions happen to share too"
    assert bundle.cost == prefix + sum(r.length - prefix for r in rows)
    batch = collate([bundle], policy.device)
    filled = -(-bundle.cost // 64) * 64
    assert tuple(batch.tokens.shape) == (1, filled)
    assert len(batch.target) == sum(e.trained_tokens for e in group.episodes)


def test_the_gradient_touches_the_sampled_step_alone(
    opened: tuple[Policy, Chat], task: Task
) -> None:
    """The loss's gradient at every position's embedding output: zero wherever a token of the
    context is predicted."""
    policy, chat = opened
    group, _ = second_turn_group(policy, chat, task)
    rows = [row(e, advantage=1.0 + n, weight=1.0, number=n) for n, e in enumerate(group.episodes)]
    context = sum(len(t.tokens) for t in group.problem.context)
    (bundles,) = pack(rows, 100_000)
    batch = collate(bundles, policy.device)
    seen: list[torch.Tensor] = []
    hidden = policy.hidden(batch.tokens, batch.positions, batch.layout)
    hidden.retain_grad()
    seen.append(hidden)
    states_ = hidden.flatten(0, 1).index_select(0, batch.before)
    logprobs, _ = policy.logprobs(batch, temperature=1.0, states=states_)
    (logprobs * batch.advantages).sum().backward()
    assert hidden.grad is not None
    touched = hidden.grad[0].abs().sum(-1) > 0
    assert not touched[: context - 1].any(), "the context predicts itself here, and is not trained"
    assert touched[context - 1], "where the action's first token is predicted"
    tokens = [t for r in rows for t, m in zip(r.tokens, r.mask, strict=True) if m]
    assert batch.target.tolist() == tokens


def test_unscored_steps_are_not_trained(opened: tuple[Policy, Chat], task: Task) -> None:
    policy, chat = opened
    group, _ = second_turn_group(policy, chat, task)
    node = recipe.Learner(loss="dr_grpo", beta=0.0, lr=0.1, schedule="constant", warmup=0.0)
    learner = Learner(
        policy, node, Accelerator(cpu=True), steps=2, limit_tokens=6, temperature=1.0, pad=0
    )
    before = {n: p.detach().clone() for n, p in policy.trainable.items()}
    stats = learner.update([group])
    assert (stats["dead"], stats["grad_norm"], stats["trained_tokens"]) == (1.0, 0.0, 0.0)
    assert all(torch.equal(before[n], p) for n, p in policy.trainable.items())
    scored = Group(
        group.problem,
        tuple(
            replace(e, reward=r)
            for e, r in zip(group.episodes, (1.0, 0.0, *[None] * 6), strict=True)
        ),
    )
    assert learner.update([scored])["trained_tokens"] == sum(
        e.trained_tokens for e in group.episodes[:2]
    )


# --- credit by step


def online(*rewards: float | None) -> Episode:
    """An episode with one action for each reward; unscored actions are not trained."""
    turns = [Turn("prompt", (1, 2, 3))]
    for n, reward in enumerate(rewards):
        turns += [
            Turn("action", (10, 11 + n), (-0.5, -0.5), trained=reward is not None),
            Turn("result", (30,)),
        ]
    return Episode(Problem("p", "q", None), tuple(turns), 1.0, {}, step_rewards=tuple(rewards))


def test_credit_by_step() -> None:
    """The baseline is the mean of all scored steps of the group: (1 + 0 + 1 + 0 + 0) / 5 = 0.4."""
    episodes = online(1.0, 0.0), online(None, 1.0, 0.0), online(0.0), online(None)
    group = Group(episodes[0].problem, episodes)
    credit = advantages(group, recipe.Learner(loss="dr_grpo"))
    assert [c if c is None else [round(a, 6) for a in c] for c in credit] == [
        [0.6, -0.4],
        [0.6, -0.4],
        [-0.4],
        None,
    ]  # type: ignore[union-attr]
    assert not is_dead(credit)
    assert is_dead(
        advantages(Group(episodes[0].problem, (online(1.0, 1.0), online(1.0))), recipe.Learner())
    )
    (made,) = (
        row(e, advantage=c, weight=1.0, number=1)
        for e, c in zip(episodes[1:2], credit[1:2], strict=True)
        if c is not None
    )
    assert made.advantage == (0.6, 0.6, -0.4, -0.4)
    assert made.mask == (False,) * 6 + (True, True, False, True, True)
    batch = collate(next(iter(pack([made], 1000))), torch.device("cpu"))
    assert batch.advantages.tolist() == pytest.approx([0.6, 0.6, -0.4, -0.4])
    assert Episode.from_json(json.loads(json.dumps(episodes[1].to_json()))) == episodes[1]
    wrong = Group(episodes[0].problem, (replace(online(1.0, 0.0), step_rewards=(1.0, None)),))
    with pytest.raises(ValueError, match="1 scored steps"):
        advantages(wrong, recipe.Learner())
