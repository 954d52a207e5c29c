"""The safety net: rounding passes, a broken mask or a sampler of other weights does not, and a run
that meets one goes on without it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import recipe as write_recipe

from minirl import recipe
from minirl.chat import Chat
from minirl.engine.model import attention
from minirl.engine.model import load as models
from minirl.engine.model.attention import Cached, Layout
from minirl.engine.model.policy import Policy
from minirl.engine.sample.agreement import Agreement, measure_agreement
from minirl.engine.sample.live import LiveSampler
from minirl.engine.sample.plain import PlainSampler
from minirl.episode import Ask, Completion, Episode, Group, Problem, Turn
from minirl.io.files import read_rows
from minirl.loop.train import train
from minirl.record.progress import Progress

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.save_tiny(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def policy(folder: str) -> Policy:
    loaded = models.load_model(
        recipe.Model(name=folder, dtype="fp32", lora=recipe.Lora(rank=4, alpha=8)), 0, CPU
    )
    made = Policy(loaded.model, loaded.device, loaded.dtype)
    generator = torch.Generator().manual_seed(1)
    for p in made.trainable.values():
        p.data.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return made


def groups(policy: Policy, *, shift: float = 0.0) -> list[Group]:
    """Two groups of three sampled episodes, the log-probabilities off by `shift`."""
    sampler = LiveSampler(policy, Chat(tiny.byte_tokenizer(), eos=[tiny.IM_END]), rows=4)
    made = []
    for number, text in enumerate(
        (
            b"a prompt that is long enough to share",
            b"and another, longer one, that is shared as well",
        )
    ):
        for seed in range(3):
            sampler.add(number * 3 + seed, Ask(tuple(text), 12, 0.7, (), seed))
    answers: dict[int, Completion] = {}
    while len(answers) < 6:
        answers |= dict(sampler.poll())
    for number, text in enumerate(
        (
            b"a prompt that is long enough to share",
            b"and another, longer one, that is shared as well",
        )
    ):
        problem = Problem(str(number), "", None)
        episodes = []
        for completion in (answers[number * 3 + seed] for seed in range(3)):
            logprobs = tuple(logprob + shift for logprob in completion.logprobs)
            episodes.append(
                Episode(
                    problem,
                    (
                        Turn("prompt", tuple(text)),
                        Turn("attempt", completion.tokens, logprobs, True),
                    ),
                )
            )
        made.append(Group(problem, tuple(episodes)))
    return made


def test_rounding_passes(policy: Policy) -> None:
    found = measure_agreement(policy, groups(policy), temperature=0.7, pad=tiny.PAD)
    assert found.sampler is not None
    assert found.layout is not None
    assert found.sampler < 2e-5
    assert found.layout < 2e-5
    assert found.holds(found.sampler)
    assert policy.model.get_base_model().config._attn_implementation == attention.NAME  # given back


@pytest.mark.parametrize("arch", tiny.ARCHITECTURES)
def test_every_family_is_compared_with_the_attention_it_came_with(
    arch: str, tmp_path: Path
) -> None:
    """Some families cannot take SDPA."""
    folder = tiny.save_tiny(tmp_path, arch)
    loaded = models.load_model(recipe.Model(name=str(folder), dtype="fp32"), 0, CPU)
    policy = Policy(loaded.model, loaded.device, loaded.dtype)
    found = measure_agreement(policy, groups(policy), temperature=0.7, pad=tiny.PAD)
    assert found.sampler is not None
    assert found.layout is not None
    assert max(found.sampler, found.layout) < 1e-4
    policy.give_up_sharing()
    again = measure_agreement(policy, groups(policy), temperature=0.7, pad=tiny.PAD)
    assert again.layout is None


def test_the_distance_is_the_mean_over_tokens(policy: Policy) -> None:
    found = measure_agreement(policy, groups(policy, shift=0.25), temperature=0.7, pad=tiny.PAD)
    assert found.sampler == pytest.approx(0.25, abs=1e-4)
    assert not found.holds(found.sampler)
    assert found.holds(found.layout)


def test_another_temperature_is_seen(policy: Policy) -> None:
    found = measure_agreement(policy, groups(policy), temperature=1.0, pad=tiny.PAD)
    assert found.sampler is not None
    assert found.sampler > 0.05


def test_a_mask_that_shows_the_future_is_seen(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Layout,
        "bias",
        lambda _, prefix, width, rule, query, key: query.new_zeros(
            query.shape[1] // key.shape[1] * width, prefix + width
        ),
    )
    found = measure_agreement(policy, groups(policy), temperature=0.7, pad=tiny.PAD)
    assert found.layout is not None
    assert found.layout > 0.05
    assert found.holds(found.sampler)


def test_nothing_sampled_nothing_compared(policy: Policy) -> None:
    problem = Problem("p", "", None)
    shown = Episode(
        problem,
        (
            Turn("prompt", tuple(b"a prompt that is long enough")),
            Turn("attempt", tuple(b"gold"), None, True),
        ),
    )
    untrained = Episode(problem, (Turn("prompt", tuple(b"a prompt")),))
    found = measure_agreement(
        policy, [Group(problem, (shown, shown))], temperature=1.0, pad=tiny.PAD
    )
    assert found.sampler is None
    assert found.layout is not None
    assert found.layout < 2e-5
    assert (
        measure_agreement(
            policy, [Group(problem, (untrained,))], temperature=1.0, pad=tiny.PAD
        ).layout
        is None
    )


def test_nan_does_not_hold() -> None:
    assert not Agreement(None, None, 0.1).holds(float("nan"))


def run(
    folder: str, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> tuple[list[dict[str, Any]], str]:
    stages = [
        {"kind": "collect", "problems": 4, "samples": 2, "batch": 2},
        {
            "kind": "train",
            "method": "reflect",
            "steps": 2,
            "group": 3,
            "batch": 2,
            "learner": {"lr": 1e-3},
        },
    ]
    path = write_recipe(tmp_path / f"{name}.yaml", Path(folder), stages)
    train(recipe.load(path), tmp_path / name, Progress())
    return read_rows(tmp_path / name / "metrics.jsonl"), capsys.readouterr().out


def test_a_run_goes_on_without_a_sampler_that_is_wrong(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a sampler that forgets its past the run's numbers are those of `generate` from the first
    step on."""
    with monkeypatch.context() as patched:
        patched.setattr(
            "minirl.loop.open_model.open_sampler",
            lambda policy, chat, *, rows, **_: PlainSampler(policy, chat, rows=rows),
        )
        expected, _ = run(folder, tmp_path, "plain", capsys)
    bias = Cached.bias
    monkeypatch.setattr(
        Cached, "bias", lambda self, rule, *rest: bias(self, replace(rule, window=3), *rest)
    )
    rows, shown = run(folder, tmp_path, "broken", capsys)
    assert shown.count("WARNING: the live sampler does not agree with plain rows") == 1
    assert [row["sampled"] for row in rows] == [row["sampled"] for row in expected]
    assert [row.get("mismatch_kl", 0.0) for row in rows] == pytest.approx(
        [row.get("mismatch_kl", 0.0) for row in expected], abs=1e-6
    )
    assert [row["reward"] for row in rows] == [row["reward"] for row in expected]


def test_a_sound_run_says_so(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, shown = run(folder, tmp_path, "sound", capsys)
    assert "WARNING" not in shown
    assert shown.count("mean distance from plain rows") == 2  # once a stage
