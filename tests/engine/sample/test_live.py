"""The live sampler against the plain one, exact sampling, stop strings, and tokens that are never
computed twice."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from tiny import ARCHITECTURES, save_tiny
from torch import Tensor

from minirl import recipe
from minirl.chat import Chat
from minirl.engine.model import load as models
from minirl.engine.model.policy import Policy
from minirl.engine.sample.kv_cache import KVView
from minirl.engine.sample.live import LiveSampler, open_sampler
from minirl.engine.sample.plain import PlainSampler
from minirl.engine.sample.runner import GraphRunner, Step
from minirl.episode import Ask, Completion

FOLLOW = 1000


def opened(folder: Path, arch: str = "llama") -> tuple[Policy, Chat]:
    save_tiny(folder, arch)
    model = models.load_model(recipe.Model(name=str(folder), dtype="fp32"), 0, torch.device("cpu"))
    return Policy(model.model, model.device, model.dtype), Chat(model.tokenizer)


def asks_of(rng: Random, groups: int = 4) -> list[Ask]:
    """Groups of four: three asks with one prompt, one that goes a token further."""
    asks = []
    for _ in range(groups):
        base = tuple(rng.randrange(256) for _ in range(rng.randrange(5, 40)))
        for i in range(4):
            tokens = base if i < 3 else (*base, 7)
            asks.append(
                Ask(
                    tokens,
                    rng.randrange(1, 30),
                    rng.choice([1.0, 0.7, 0.0]),
                    ("ab",),
                    rng.randrange(10**9),
                )
            )
    return asks


def run(sampler: LiveSampler | PlainSampler, asks: list[Ask]) -> dict[int, Completion]:
    """Every ask, and for each a second one that goes on with its conversation."""
    done: dict[int, Completion] = {}
    for key, ask in enumerate(asks):
        sampler.add(key, ask)
    while len(done) < 2 * len(asks):
        for key, completion in sampler.poll():
            done[key] = completion
            if key < FOLLOW:
                sampler.add(
                    key + FOLLOW,
                    Ask(asks[key].tokens + completion.tokens + (1, 2, 3), 10, 1.0, (), key),
                )
    return done


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("rows", [3, 6, 64])
def test_live_equals_plain(arch: str, rows: int, tmp_path: Path) -> None:
    """Catches: slots mixed up when rows leave, a fork of the wrong slot, keys of an evicted
    conversation, wrong positions, one seed."""
    policy, chat = opened(tmp_path, arch)
    asks = asks_of(Random(rows))
    plain, live = (
        run(PlainSampler(policy, chat, rows=64), asks),
        run(LiveSampler(policy, chat, rows=rows), asks),
    )
    whole = 0
    for key, expected in plain.items():
        found = live[key]
        same = next(
            (
                i
                for i, (a, b) in enumerate(zip(found.tokens, expected.tokens, strict=False))
                if a != b
            ),
            len(expected.tokens),
        )
        if key < FOLLOW or live[key - FOLLOW].tokens == plain[key - FOLLOW].tokens:
            assert found.logprobs[:same] == pytest.approx(expected.logprobs[:same], abs=2e-5)
        if found.tokens == expected.tokens:
            assert (found.finish, found.text) == (expected.finish, expected.text)
            whole += 1
        elif key < FOLLOW:
            # A uniform number within rounding of the border between two neighbouring tokens.
            assert abs(found.tokens[same] - expected.tokens[same]) == 1
    assert whole >= len(plain) - 4


def test_the_sampler_knows_the_log_probabilities_of_the_policy(tmp_path: Path) -> None:
    """Invariant 4. Catches: log-probabilities before temperature, of another token, of merged or
    stale weights."""
    policy, chat = opened(tmp_path)
    ask = Ask(tuple(range(40, 70)), 20, 0.7, (), 5)
    sampler = open_sampler(policy, chat, rows=4)
    sampler.add(0, ask)
    ((_, completion),) = sampler.poll()
    ids = torch.tensor([ask.tokens + completion.tokens])
    logits = policy.model(input_ids=ids).logits[0, len(ask.tokens) - 1 : -1] / 0.7
    expected = logits.log_softmax(-1).gather(-1, torch.tensor(completion.tokens)[:, None])[:, 0]
    assert completion.logprobs == pytest.approx(expected.tolist(), abs=1e-5)


def test_every_token_is_computed_once(tmp_path: Path) -> None:
    """Catches: forks prefilled one by one, a conversation that goes on prefilled from its start."""
    policy, chat = opened(tmp_path)
    sampler = LiveSampler(policy, chat, rows=8)
    prompt = tuple(range(100))
    for key in range(8):
        sampler.add(key, Ask(prompt, 12, 1.0, (), key))
    done: dict[int, Completion] = {}
    while len(done) < 8:
        done |= dict(sampler.poll())
    assert sampler.runner.prefilled == 100
    for key, completion in done.items():
        sampler.add(key, Ask((*prompt, *completion.tokens, 1, 2, 3), 4, 1.0, (), key))
    while len(done) < 16:
        done |= {FOLLOW + key: completion for key, completion in sampler.poll()}
    # The last sampled token was never fed; with the three new ones each conversation computes four.
    assert sampler.runner.prefilled == 100 + 8 * 4


def test_few_numbers_of_keys_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each number of keys costs a CPU new kernels. Catches: one of its own for every step, keys
    behind the slots' end, a key too few."""
    policy, chat = opened(tmp_path)
    sampler = LiveSampler(policy, chat, rows=4)
    read: list[tuple[int, int]] = []

    def view(rows: slice | Tensor, positions: Tensor, width: int) -> KVView:
        read.append((int(positions.max()) + 1, width))
        assert width <= sampler.cache.capacity
        return plain(rows, positions, width)

    plain = sampler.cache.view
    monkeypatch.setattr(sampler.cache, "view", view)
    run(sampler, asks_of(Random(1)))
    assert all(needed <= width < needed + 16 for needed, width in read)
    assert {width % 16 for _, width in read} == {0}
    assert len({width for _, width in read}) < len({needed for needed, _ in read}) / 4


@pytest.mark.parametrize("budget", [1, 64, 192, 500])
def test_a_token_budget_bounds_the_slots_and_changes_nothing(budget: int, tmp_path: Path) -> None:
    """Catches: a live row forgotten when slots grow, the budget passed by, a wait for room that
    never comes, slots mixed up by eviction."""
    policy, chat = opened(tmp_path)
    rng, longest = Random(budget), 0
    asks = [
        Ask(tuple(rng.randrange(256) for _ in range(rng.choice([5, 40, 90, 150]))), 12, 1.0, (), n)
        for n in range(14)
    ]
    sampler = LiveSampler(policy, chat, rows=8, cache_tokens=budget)
    reserve = sampler.cache.reserve

    def watched(length: int, live: int) -> None:
        nonlocal longest
        reserve(length, live)
        cache = sampler.cache
        assert cache.count == len(cache.tokens) == len(cache._used)
        # One conversation is always let in.
        assert cache.count * cache.capacity <= budget or cache.count == 1
        assert live <= cache.count
        longest = max(longest, cache.capacity)

    sampler.cache.reserve = watched  # type: ignore[method-assign]
    bounded, free = run(sampler, asks), run(LiveSampler(policy, chat, rows=8), asks)
    assert longest >= 150
    assert sampler.cache.count == max(1, budget // longest)
    assert [bounded[key].tokens for key in sorted(bounded)] == [
        free[key].tokens for key in sorted(free)
    ]
    for key, completion in free.items():
        assert bounded[key].logprobs == pytest.approx(completion.logprobs, abs=2e-5)
    sampler.reset()
    assert sampler.cache.count == 8


class EagerGraphs(GraphRunner):
    """The runner of captured graphs with the one thing that needs a GPU replaced: a step is
    replayed by running it again."""

    def capture(self, step: Step) -> Step:
        return step


@pytest.mark.parametrize("arch", ["llama", "gemma3_text"])
def test_padded_steps_change_nothing(arch: str, tmp_path: Path) -> None:
    """Catches: a padded row that writes over an idle conversation or another row, static tensors
    not filled, graphs of moved memory."""
    policy, chat = opened(tmp_path, arch)
    asks = asks_of(Random(5), groups=6)
    plain, padded = LiveSampler(policy, chat, rows=7), LiveSampler(policy, chat, rows=7)
    padded.cache.keeps_memory = True
    graphs = padded.runner = EagerGraphs(policy, padded.cache)
    for _ in range(2):
        expected, found = run(plain, asks), run(padded, asks)
        assert [found[key].tokens for key in sorted(found)] == [
            expected[key].tokens for key in sorted(expected)
        ]
        for key, completion in expected.items():
            assert found[key].logprobs == pytest.approx(completion.logprobs, abs=2e-5)
        assert graphs.prefilled == plain.runner.prefilled, "an idle conversation was lost"
        plain.reset()
        padded.reset()
    assert graphs.works
    assert {rows for rows, _ in graphs.graphs} <= {1, 2, 4, 7}
    kept = dict(graphs.graphs)
    with torch.no_grad():
        for p in policy.trainable.values():
            p.add_(0.05)
    plain.reset()
    padded.reset()
    expected, found = run(plain, asks), run(padded, asks)
    assert [found[key].tokens for key in sorted(found)] == [
        expected[key].tokens for key in sorted(expected)
    ]
    assert all(graphs.graphs[size] is graph for size, graph in kept.items()), (
        "graphs outlive an update of the weights"
    )


def test_a_capture_that_fails_is_told_once_and_decoding_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policy, chat = opened(tmp_path)

    class Failing(GraphRunner):
        def capture(self, step: Step) -> Step:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    sampler = LiveSampler(policy, chat, rows=4)
    sampler.runner = Failing(policy, sampler.cache)
    asks = asks_of(Random(6))
    expected = run(LiveSampler(policy, chat, rows=4), asks)
    with caplog.at_level("WARNING", logger="minirl"):
        assert run(sampler, asks) == expected
    assert [record.message for record in caplog.records] == [
        "CUDA graphs do not work here (operation not permitted when stream is capturing); decoding"
        " goes on without them"
    ]


@pytest.mark.parametrize(("budget", "grown"), [(None, 192), (4 * 64, 64)])
def test_the_cache_grows_once_for_all_that_wait(
    budget: int | None, grown: int, tmp_path: Path
) -> None:
    """Catches: a growth, which copies the whole cache, at every longer ask; room for them taken
    from those that a budget still lets in."""
    policy, chat = opened(tmp_path)
    sampler = LiveSampler(policy, chat, rows=4, cache_tokens=budget)
    for key, length in enumerate((10, 10, 10, 10, 150)):
        sampler.add(key, Ask((key, *range(length)), 20, 1.0))
    sampler.poll()
    assert sampler.cache.capacity == grown


def test_a_reset_forgets_and_refuses_to_forget_running_asks(tmp_path: Path) -> None:
    policy, chat = opened(tmp_path)
    sampler = LiveSampler(policy, chat, rows=2)
    sampler.add(0, Ask((1, 2, 3), 4, 1.0))
    with pytest.raises(RuntimeError, match="1 waiting"):
        sampler.reset()
    before = sampler.poll()
    with torch.no_grad():
        for p in policy.trainable.values():
            p.add_(0.05)
    sampler.reset()
    sampler.add(0, Ask((1, 2, 3), 4, 1.0))
    assert sampler.poll()[0][1].logprobs != before[0][1].logprobs
    assert sampler.runner.prefilled == 6


def test_a_family_without_slots_takes_the_plain_sampler_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policy, chat = opened(tmp_path)
    with caplog.at_level("INFO", logger="minirl"):
        assert isinstance(open_sampler(policy, chat, rows=2), LiveSampler)
        assert caplog.messages == []
        policy.shares_prefixes = False
        sampler: Any = open_sampler(policy, chat, rows=2)
    assert isinstance(sampler, PlainSampler)
    assert caplog.messages == [
        "llama models cannot share prefixes here: sampling by `generate`, learning on plain rows"
    ]


def test_a_models_own_generation_config_warps_nothing(tmp_path: Path) -> None:
    """Catches: Qwen's repetition penalty at work in `generate`."""
    policy, chat = opened(tmp_path)
    policy.model.get_base_model().generation_config.repetition_penalty = 5.0
    ask = Ask(tuple(range(40, 60)), 25, 1.0, (), 3)
    found = []
    for sampler in (PlainSampler(policy, chat, rows=1), LiveSampler(policy, chat, rows=1)):
        sampler.add(0, ask)
        found.append(sampler.poll()[0][1].tokens)
    assert found[0] == found[1]
    assert policy.model.get_base_model().generation_config.repetition_penalty == 5.0
