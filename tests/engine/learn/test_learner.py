"""Learner: its gradient against a plain computation, and what must hold however a step goes (dead
groups, NaN, no memory, a kill)."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from random import Random
from threading import Barrier
from typing import Any

import pytest
import tiny
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor

from minirl import recipe
from minirl.engine.learn import losses, optim
from minirl.engine.learn.learner import MIN_MICRO_TOKENS, NO_WORKSPACE, Learner
from minirl.engine.model import load as models
from minirl.engine.model.policy import Policy
from minirl.episode import Episode, Group, Problem, Turn

CPU = torch.device("cpu")
LIMIT = 16  # most trained tokens of an episode, Dr. GRPO's denominator
NO_CLIP = (
    1e9  # a gradient norm that is never reached: p.grad after an update is then the gradient itself
)
LOSSES = ("grpo", "dr_grpo", "dapo", "gspo", "rloo", "reinforce", "nll")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.save_tiny(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def policy(folder: str) -> Policy:
    """A policy whose adapter is not fresh: A and B are both random."""
    made = open_policy(folder)
    stir(made, 1)
    return made


def open_policy(folder: str, dtype: Any = "fp32") -> Policy:
    loaded = models.load_model(
        recipe.Model(name=folder, dtype=dtype, lora=recipe.Lora(rank=4, alpha=8)), 0, CPU
    )
    return Policy(loaded.model, loaded.device, loaded.dtype)


def stir(policy: Policy, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in policy.trainable.values():
        p.data.copy_(torch.randn(p.shape, generator=generator) * 0.1)


def open_learner(
    policy: Policy, *, steps: int = 10, temperature: float = 1.0, **settings: Any
) -> Learner:
    values: dict[str, Any] = {
        "beta": 0.0,
        "grad_clip": NO_CLIP,
        "warmup": 0.0,
        "schedule": "constant",
        "lr": 1e-2,
    } | settings
    return Learner(
        policy,
        recipe.Learner(**values),
        Accelerator(cpu=True),
        steps=steps,
        limit_tokens=LIMIT,
        temperature=temperature,
        pad=tiny.PAD,
    )


def group(seed: int, *rewards: float | None, prompt: int = 20, cut: int | None = None) -> Group:
    """Episodes of one prompt: trained, untrained and trained again, and a sampled but untrained
    end. `cut`: which one was overlong."""
    rng = Random(seed)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(256) for _ in range(count))

    problem, start = Problem(f"p{seed}", "?", None), Turn("prompt", ids(prompt))
    episodes = []
    for number, reward in enumerate(rewards):
        think, result, answer, retry = (
            ids(rng.randint(1, 6)),
            ids(rng.randint(2, 5)),
            ids(rng.randint(2, 6)),
            ids(4),
        )
        turns = (
            start,
            Turn("think", think, (-1.0,) * len(think), trained=True),
            Turn("result", result),
            Turn("answer", answer, (-1.0,) * len(answer), trained=True),
            Turn("retry", retry, (-1.0,) * len(retry)),
        )
        episodes.append(
            Episode(problem, turns, reward, finish="length" if number == cut else "stop")
        )
    return Group(problem, tuple(episodes))


def step_groups() -> list[Group]:
    """Two live groups, one with a long prompt and one with a short; a dead one between them; an
    episode that was not scored."""
    live, dead = group(1, 1.0, 0.0, 0.5, None, 0.0, cut=2), group(2, 0.0, 0.0, 0.0)
    return [live, dead, group(3, 0.0, 1.0, 1.0, 0.0, prompt=6)]


def on_policy(
    groups: Sequence[Group],
    plain: Plain,
    offset: Callable[[int, int, int], float] = lambda i, t, n: 0.0,
) -> list[Group]:
    """The groups with old log-probabilities that are the model's own less `offset` of (episode's
    number, trained token, how many)."""
    numbers = itertools.count()

    def shifted(e: Episode) -> Episode:
        values, i, n = plain.logprobs(e)[0].tolist(), next(numbers), e.trained_tokens
        old = iter([value - offset(i, t, n) for t, value in enumerate(values)])
        turns = [
            replace(turn, logprobs=tuple(next(old) for _ in turn.tokens)) if turn.trained else turn
            for turn in e.turns
        ]
        return replace(e, turns=tuple(turns))

    with torch.no_grad():
        return [Group(g.problem, tuple(shifted(e) for e in g.episodes)) for g in groups]


def by_token(i: int, t: int, n: int) -> float:
    """Logarithms of ratios well inside and well outside the clip range of 0.2, on both sides."""
    return (0.05, -0.5, 0.22, -0.1, 0.6)[(i + t) % 5]


def by_sequence(i: int, t: int, n: int) -> float:
    """The same for GSPO's range: the mean over an episode is one of the four, its tokens lie far
    apart."""
    return (2e-4, -2e-4, 2e-3, -2e-3)[i % 4] + 0.3 * (t - (n - 1) / 2)


class Plain:
    """The same computation without any of ours: stock attention, one episode a forward, logits of
    all positions."""

    def __init__(self, folder: str, policy: Policy, temperature: float = 1.0) -> None:
        self.model = models.load_model(
            recipe.Model(name=folder, dtype="fp32", lora=recipe.Lora(rank=4, alpha=8)), 0, CPU
        ).model
        self.temperature = temperature
        self.trainable = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        for name, p in policy.trainable.items():
            self.trainable[name].data.copy_(p.data)

    def logprobs(self, e: Episode) -> tuple[Tensor, Tensor]:
        """Log-probability of each trained token and the entropy there, (n,) and (n,)."""
        logits = self.model(input_ids=torch.tensor([e.tokens])).logits[0]  # (T, V)
        scores = torch.log_softmax(logits / self.temperature, dim=-1)
        where = [t for t, trained in enumerate(e.mask) if trained]
        chosen = torch.stack([scores[t - 1, e.tokens[t]] for t in where])
        return chosen, torch.stack([-(scores[t - 1].exp() * scores[t - 1]).sum() for t in where])

    def gradient(self, total: Tensor) -> dict[str, Tensor]:
        return dict(
            zip(
                self.trainable,
                torch.autograd.grad(total, list(self.trainable.values())),
                strict=True,
            )
        )

    def loss(
        self,
        name: str,
        groups: Sequence[Group],
        reference: Plain | None = None,
        beta: float = 0.0,
        bonus: float = 0.0,
    ) -> Tensor:
        """A preset's loss, written out token by token."""
        taken = [[e for e in g.episodes if _is_taken(name, e)] for g in groups]
        episodes, tokens = sum(map(len, taken)), sum(e.trained_tokens for es in taken for e in es)
        total = torch.zeros(())
        for g, members in zip(groups, taken, strict=True):
            credit = [
                _advantage(name, e.reward, [r for r in g.rewards if r is not None]) for e in members
            ]
            if not any(credit):
                continue  # dead: it is in the two denominators and nowhere else
            for e, advantage in zip(members, credit, strict=True):
                now, entropy = self.logprobs(e)
                anchor = now.detach() if reference is None else reference.logprobs(e)[0].detach()
                old = [lp for lp, trained in zip(e.logprobs, e.mask, strict=True) if trained]
                n = len(old)
                weight = {
                    "dapo": 1 / tokens,
                    "nll": 1 / tokens,
                    "dr_grpo": 1 / (episodes * LIMIT),
                    "rloo": 1 / (episodes * LIMIT),
                }
                sequence = torch.exp(torch.stack([now[t] - old[t] for t in range(n)]).sum() / n)
                for t in range(n):
                    ratio = sequence if name == "gspo" else torch.exp(now[t] - old[t])
                    k3 = torch.exp(anchor[t] - now[t]) - (anchor[t] - now[t]) - 1
                    gain = now[t] if name == "nll" else _gain(name, ratio, advantage)
                    total = total - weight.get(name, 1 / (episodes * n)) * (
                        gain - beta * k3 + bonus * entropy[t]
                    )
        return total


def _is_taken(name: str, e: Episode) -> bool:
    return name == "nll" or (e.reward is not None and not (name == "dapo" and e.finish == "length"))


def _advantage(name: str, reward: float | None, scored: list[float]) -> float:
    if name == "nll":
        return 1.0
    assert reward is not None
    mean, n = sum(scored) / len(scored), len(scored)
    if name == "reinforce":
        return reward
    if name == "rloo":
        return reward - (sum(scored) - reward) / (n - 1)
    if name == "dr_grpo":
        return reward - mean
    return (reward - mean) / (math.sqrt(sum((r - mean) ** 2 for r in scored) / (n - 1)) + 1e-6)


def _gain(name: str, ratio: Tensor, advantage: float) -> Tensor:
    low, high = {
        "dapo": (0.8, 1.28),
        "gspo": (1 - 3e-4, 1 + 4e-4),
        "reinforce": (0.0, math.inf),
    }.get(name, (0.8, 1.2))
    return torch.minimum(ratio * advantage, torch.clamp(ratio, low, high) * advantage)


def gradient(policy: Policy) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in policy.trainable.items() if p.grad is not None}


def weights(policy: Policy) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in policy.trainable.items()}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Norm of the difference over the norm of `b`, all tensors as one vector."""
    assert a.keys() == b.keys()
    left, right = (torch.cat([x[name].flatten().double() for name in b]) for x in (a, b))
    assert right.norm() > 0
    return float((left - right).norm() / right.norm())


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Equal to the last bit, NaN included."""
    return a.keys() == b.keys() and all(
        torch.equal(a[n].view(torch.int32), b[n].view(torch.int32)) for n in b
    )


def forward_sizes(policy: Policy) -> list[int]:
    """A list that grows by the number of token positions of each forward through the decoder."""
    sizes: list[int] = []

    def record(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sizes.append((kwargs["input_ids"] if "input_ids" in kwargs else args[0]).numel())

    policy.model.get_base_model().get_decoder().register_forward_pre_hook(record, with_kwargs=True)
    return sizes


# --- the gradient itself


@pytest.mark.parametrize("extras", [False, True], ids=["bare", "kl+entropy+temperature"])
@pytest.mark.parametrize("name", LOSSES)
def test_gradient_is_that_of_the_written_out_formula(
    folder: str, policy: Policy, name: str, extras: bool
) -> None:
    """Invariant 2. Catches: a loss that touches an untrained token, a target or mask off by one, a
    wrong denominator or advantage, a dead group left out of the denominators, temperature / KL /
    entropy missing or of the wrong sign, a reference that is not the snapshot."""
    beta, bonus, temperature = (0.3, 0.02, 0.7) if extras else (0.0, 0.0, 1.0)
    anchor = Plain(folder, policy, temperature)
    policy.freeze_reference()
    stir(policy, 2)
    plain = Plain(folder, policy, temperature)
    groups = on_policy(step_groups(), plain, by_sequence if name == "gspo" else by_token)
    bonus = 0.0 if name == "nll" else bonus
    total = plain.loss(name, groups, anchor if extras else None, beta, bonus)

    stats = open_learner(
        policy, loss=name, beta=beta, entropy=bonus, temperature=temperature
    ).update(groups)
    assert distance(gradient(policy), plain.gradient(total)) < 1e-5
    assert stats["loss"] == pytest.approx(total.item(), rel=1e-5, abs=1e-6)
    assert stats["grad_norm"] == pytest.approx(
        math.sqrt(sum(float(g.norm()) ** 2 for g in gradient(policy).values())), rel=1e-5
    )


def test_the_means_that_are_logged(folder: str, policy: Policy) -> None:
    """Catches: means over padding or over untrained tokens, KL the wrong way round, a clip fraction
    of something else."""
    anchor = Plain(folder, policy)
    policy.freeze_reference()
    stir(policy, 2)
    plain = Plain(folder, policy)
    groups = on_policy(step_groups(), plain, by_token)
    stats = open_learner(policy, beta=0.1).update(groups)

    live = [e for g in (groups[0], groups[2]) for e in g.episodes if e.reward is not None]
    now, entropy = (
        torch.cat(parts) for parts in zip(*(plain.logprobs(e) for e in live), strict=True)
    )
    old = torch.tensor(
        [lp for e in live for lp, trained in zip(e.logprobs, e.mask, strict=True) if trained]
    )
    held = torch.cat([anchor.logprobs(e)[0] for e in live]) - now
    assert stats["trained_tokens"] == len(old)
    assert stats["entropy"] == pytest.approx(entropy.mean().item(), rel=1e-5)
    assert stats["kl"] == pytest.approx((held.exp() - held - 1).mean().item(), rel=1e-4)
    assert stats["mismatch_kl"] == pytest.approx(
        ((now - old).exp() - (now - old) - 1).mean().item(), rel=1e-4
    )
    signs = [
        _advantage("grpo", e.reward, [r for r in g.rewards if r is not None])
        for g in groups
        for e in g.episodes
        if e in live
    ]
    ratios = torch.split((now - old).exp(), [e.trained_tokens for e in live])
    clipped = sum(
        int((r > 1.2).sum() if a > 0 else (r < 0.8).sum())
        for a, r in zip(signs, ratios, strict=True)
        if a
    )
    assert clipped > 0
    assert stats["clip"] == pytest.approx(clipped / len(old))


def test_nothing_that_is_untrained_reaches_the_gradient(policy: Policy) -> None:
    """Invariant 2, to the last bit. Catches: `sampled` taken for `trained`, turns after the last
    trained one computed for nothing."""
    sizes = forward_sizes(policy)
    groups = step_groups()
    open_learner(policy).update(groups)
    before, cost = gradient(policy), list(sizes)

    def disturbed(e: Episode) -> Episode:
        *turns, retry = e.turns
        turns[2] = replace(
            turns[2], logprobs=(-7.0,) * len(turns[2].tokens)
        )  # as if the retrieved text had been sampled
        return replace(
            e, turns=(*turns, replace(retry, tokens=tuple(range(50)), logprobs=(-9.0,) * 50))
        )

    stir(policy, 1)
    sizes.clear()
    open_learner(policy).update(
        [Group(g.problem, tuple(disturbed(e) for e in g.episodes)) for g in groups]
    )
    assert same_bits(gradient(policy), before)
    assert sizes == cost


@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_on_policy_the_ratio_is_one(
    folder: str, policy: Policy, name: str, temperature: float
) -> None:
    """Invariant 4. Catches: tokens scored at another temperature than the sampler's, a position
    off, a ratio to something else."""
    groups = on_policy(step_groups(), Plain(folder, policy, temperature))
    stats = open_learner(policy, loss=name, temperature=temperature).update(groups)
    taken = [(g, e) for g in groups for e in g.episodes if _is_taken(name, e)]
    advantages = [
        _advantage(name, e.reward, [r for r in g.rewards if r is not None]) for g, e in taken
    ]
    tokens = [e.trained_tokens for _, e in taken]
    # At ratio 1 the loss is -sum(weight * advantage): each episode's advantage once, or once a
    # token of all tokens.
    a_token = -sum(a * n for a, n in zip(advantages, tokens, strict=True)) / sum(tokens)
    assert stats["loss"] == pytest.approx(
        a_token if name == "dapo" else -sum(advantages) / len(taken), abs=1e-5
    )
    assert stats["clip"] == 0.0
    assert 0.0 <= stats["mismatch_kl"] < 1e-8


@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches_do_not_change_the_gradient(folder: str, policy: Policy, name: str) -> None:
    """Invariant 5. Catches: a denominator taken over the micro-batch, gradients overwritten instead
    of added, a GSPO mean over a part."""
    sizes = forward_sizes(policy)
    plain = Plain(folder, policy)
    groups = on_policy(
        [*step_groups(), *many()], plain, by_sequence if name == "gspo" else by_token
    )
    got: dict[int, tuple[int, dict[str, Tensor], float]] = {}
    for micro_tokens in (100_000, 256, 64, 1):
        stir(policy, 1)
        policy.freeze_reference()
        sizes.clear()
        stats = open_learner(policy, loss=name, micro_tokens=micro_tokens).update(groups)
        got[micro_tokens] = (len(sizes), gradient(policy), stats["loss"])
    counts = [count for count, _, _ in got.values()]
    assert counts[0] < counts[1] < counts[2] < counts[3]
    for _, other, loss in got.values():
        assert distance(other, got[100_000][1]) < 1e-6
        assert loss == pytest.approx(got[100_000][2], rel=1e-5, abs=1e-6)


class Half:
    """The accelerator of one of two processes, which are two threads here."""

    num_processes = 2

    def __init__(self, rank: int, board: dict[int, Tensor], barrier: Barrier) -> None:
        self.rank, self.board, self.barrier = rank, board, barrier

    def reduce(self, tensor: Tensor, how: str) -> Tensor:
        assert how == "sum"
        self.board[self.rank] = tensor
        self.barrier.wait()
        total = self.board[0] + self.board[1]
        self.barrier.wait()
        return total


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "nll"])
def test_two_processes_make_the_step_of_one(folder: str, name: str) -> None:
    """Invariant 5. Catches: denominators of one process, gradients not summed (or averaged), a
    deadlock where one has dead groups only."""
    settings: dict[str, Any] = {"loss": name, "grad_clip": 0.01}
    groups = [
        group(2, 0.0, 0.0, 0.0),
        group(3, 0.0, 1.0, 1.0, 0.0, prompt=6),
        group(1, 1.0, 0.0, 0.5, cut=2),
    ]
    policies = [open_policy(folder) for _ in range(3)]
    for made in policies:
        stir(made, 1)
    whole = open_learner(policies[0], **settings).update(groups)
    board: dict[int, Tensor] = {}
    barrier = Barrier(2, timeout=60)
    learners = [open_learner(made, **settings) for made in policies[1:]]
    for rank, learner in enumerate(learners):
        learner.accelerator = Half(rank, board, barrier)  # type: ignore[assignment]
    with ThreadPoolExecutor(2) as threads:
        stats = list(
            threads.map(
                lambda learner, share: learner.update(share), learners, (groups[:1], groups[1:])
            )
        )
    for made in policies[1:]:
        assert distance(gradient(made), gradient(policies[0])) < 1e-6
    assert same_bits(weights(policies[1]), weights(policies[2]))
    assert stats[0] == stats[1]
    assert stats[0] == pytest.approx(whole, rel=1e-5, abs=1e-6)


def test_a_process_with_only_dead_groups_can_take_its_first_float16_step(policy: Policy) -> None:
    """Catches: a gradient scaler that does not exist before the first loss, so that this process
    dies and the others wait for ever."""
    policy.dtype = torch.float16
    learner = open_learner(policy)
    before = weights(policy)
    assert (
        learner.optimizer.step(learner.accelerator) == 0.0
    )  # another process had something to learn; here no backward pass was made
    assert same_bits(weights(policy), before)


def test_the_norm_of_the_gradient_is_clipped(policy: Policy) -> None:
    """Catches: no clipping, the clipped norm logged in place of the true one."""
    open_learner(policy).update(step_groups())
    whole = gradient(policy)
    stir(policy, 1)
    stats = open_learner(policy, grad_clip=0.001).update(step_groups())
    norm = math.sqrt(sum(float(g.norm()) ** 2 for g in whole.values()))
    assert norm > 0.002
    assert stats["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert (
        distance(gradient(policy), {name: g * (0.001 / norm) for name, g in whole.items()}) < 1e-4
    )


# --- dead groups


def test_dead_groups_alone_change_nothing_but_the_schedule(policy: Policy) -> None:
    """Catches: an optimizer step on a zero gradient (AdamW's moments and weight decay would move
    the weights), a forward for nothing."""
    sizes = forward_sizes(policy)
    learner = open_learner(policy, beta=0.1, weight_decay=0.1, schedule="linear")
    policy.freeze_reference()
    learner.update(step_groups())
    sizes.clear()
    before, state = weights(policy), optim.flatten(learner.optimizer.adapter)[0]
    stats = learner.update([group(6, 0.0, 0.0), group(7, 1.0, None, 1.0), group(8, None, None)])
    assert sizes == []
    assert same_bits(weights(policy), before)
    assert same_bits(optim.flatten(learner.optimizer.adapter)[0], state)
    assert learner.updates == 2
    assert stats["lr"] == pytest.approx(0.009)  # 1e-2 * (1 - 1/10)
    assert (
        stats | {"loss": 0.0, "grad_norm": 0.0, "kl": 0.0, "trained_tokens": 0.0, "skipped": 0.0}
        == stats
    )


def test_a_dead_group_costs_no_forward_and_counts_in_the_denominator(policy: Policy) -> None:
    """Catches: dead groups computed anyway, or left out of the denominator (the same problems would
    then get another step size)."""
    sizes = forward_sizes(policy)
    live, dead = group(1, 1.0, 0.0, 0.0, 1.0), group(2, 1.0, 1.0, 1.0, 1.0)
    open_learner(policy).update([live])
    alone, cost = gradient(policy), list(sizes)
    stir(policy, 1)
    sizes.clear()
    open_learner(policy).update([dead, live])
    assert cost
    assert sizes == cost
    assert same_bits(
        {name: 2.0 * g for name, g in gradient(policy).items()}, alone
    )  # 1 / 8 of a power of two for 1 / 4: exact


# --- precision


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_adapters_are_float32_and_small_steps_move_them(folder: str, dtype: str) -> None:
    """Invariant 6. Catches: adapters in the compute dtype: there a step of 1e-6 is lost on nearly
    all weights."""
    policy = open_policy(folder, dtype)
    stir(policy, 1)
    learner = open_learner(policy, lr=1e-6)
    before = weights(policy)
    learner.update(step_groups())
    state = optim.flatten(learner.optimizer.adapter)[0]
    assert {
        t.dtype for t in (*weights(policy).values(), *gradient(policy).values(), *state.values())
    } == {torch.float32}
    moved = torch.cat([(p != before[name]).flatten() for name, p in policy.trainable.items()])
    assert moved.float().mean() > 0.95


@pytest.mark.parametrize("how", ["infinite advantage", "NaN weight", "NaN loss"])
def test_a_gradient_that_is_not_finite_skips_the_step(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Invariant 6. Catches: a step on NaN (all weights lost), moments that took it in, a skip that
    is not counted or not ended."""
    learner = open_learner(policy, loss="reinforce", weight_decay=0.1)
    groups = [group(1, 1.0, 0.0)]
    learner.update(groups)
    good = weights(policy)
    bad = groups
    with monkeypatch.context() as patch:
        if how == "infinite advantage":
            bad = [group(1, math.inf, 0.0)]
        elif how == "NaN weight":
            next(iter(policy.trainable.values())).data[0, 0] = math.nan
        else:
            patch.setattr(
                losses,
                "policy_loss",
                lambda logprobs, *_, **__: (
                    logprobs.sum() * math.nan,
                    torch.zeros(len(logprobs)).bool(),
                ),
            )
        before, state = weights(policy), optim.flatten(learner.optimizer.adapter)[0]
        stats = learner.update(bad)
    assert same_bits(weights(policy), before)
    assert same_bits(optim.flatten(learner.optimizer.adapter)[0], state)
    assert (stats["skipped"], learner.updates) == (1.0, 2)
    for name, p in policy.trainable.items():
        p.data.copy_(good[name])
    assert learner.update(groups)["skipped"] == 1.0
    assert not same_bits(weights(policy), good)
    assert all(p.isfinite().all() for p in policy.trainable.values())


def test_float16_scales_its_loss_and_not_its_gradient(folder: str) -> None:
    """Catches: a gradient that is clipped, logged or applied before the loss scale is taken out; a
    skip that leaves the scale as it was."""
    policy = open_policy(folder)
    stir(policy, 1)
    expected = open_learner(policy, grad_clip=0.001).update(step_groups())
    plain, after = gradient(policy), weights(policy)
    stir(policy, 1)
    policy.dtype = (
        torch.float16
    )  # turns on the scaler alone; the model goes on computing in float32
    learner = open_learner(policy, grad_clip=0.001)
    scale = learner.optimizer.scaler.get_scale()
    assert scale > 1.0
    assert learner.update(step_groups()) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert distance(gradient(policy), plain) < 1e-5
    assert distance(weights(policy), after) < 1e-5
    before = weights(policy)
    reinforce = open_learner(policy, loss="reinforce")
    assert reinforce.update([group(1, math.inf, 0.0)])["skipped"] == 1.0
    assert same_bits(weights(policy), before)
    assert reinforce.optimizer.scaler.get_scale() == scale / 2


# --- the reference


def test_kl_is_exactly_zero_at_the_start_of_a_stage(policy: Policy) -> None:
    """Invariant 7. Catches: "adapter off" as the reference (wrong after a warm-up), an older
    stage's snapshot, a reference that follows."""
    policy.freeze_reference()
    first = open_learner(policy, beta=0.1)
    assert first.update(step_groups())["kl"] == 0.0
    assert first.update(step_groups())["kl"] > 1e-6
    policy.freeze_reference()
    assert open_learner(policy, beta=0.1).update(step_groups())["kl"] == 0.0


def test_the_reference_leaves_the_policy_as_it_was(policy: Policy) -> None:
    """Catches: weights not put back after the reference's forward, also after an error inside it;
    gradients left off."""
    policy.freeze_reference()
    held = weights(policy)
    stir(policy, 2)
    before = weights(policy)
    with policy.reference():
        inside = weights(policy)
    assert same_bits(inside, held)
    assert same_bits(weights(policy), before)
    with pytest.raises(ZeroDivisionError), policy.reference():
        raise ZeroDivisionError
    assert same_bits(weights(policy), before)
    assert torch.is_grad_enabled()


# --- memory


def failing(
    policy: Policy,
    monkeypatch: pytest.MonkeyPatch,
    fails: Callable[[int, int], bool],
    error: type[RuntimeError] = torch.OutOfMemoryError,
) -> list[int]:
    """Let policy.logprobs run out of memory where `fails(call, size)`, after its forward; returns
    the sizes of all calls, which grows."""
    calls: list[int] = []
    sizes, compute = forward_sizes(policy), policy.logprobs

    def logprobs(*args: Any, **kwargs: Any) -> Any:
        result = compute(*args, **kwargs)
        calls.append(sizes[-1])
        if fails(len(calls), sizes[-1]):
            raise error(
                "CUDA out of memory"
                if error is torch.OutOfMemoryError
                else f"CUDA error: {NO_WORKSPACE} when calling cublasCreate"
            )
        return result

    monkeypatch.setattr(policy, "logprobs", logprobs)
    return calls


def many() -> list[Group]:
    return [
        group(10 + i, 1.0, 0.0, 0.5, 0.0, prompt=10) for i in range(8)
    ]  # some 700 tokens before the retries


def test_out_of_memory_halves_the_micro_batch_for_good(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches: no retry, no lasting halving, what was summed before the failure counted twice
    (gradient or means)."""
    whole = open_learner(policy, micro_tokens=100_000).update(many())
    expected = gradient(policy)
    stir(policy, 1)
    learner = open_learner(policy, micro_tokens=1024)
    calls = failing(policy, monkeypatch, lambda _, size: size > 256)
    stats = learner.update(many())
    assert [size > 256 for size in calls[:3]].count(True) >= 1
    assert learner.micro_tokens == 256
    assert (
        "micro-batches of at most 256 tokens from here on (learner.micro_tokens was 1024)"
        in caplog.text
    )
    assert distance(gradient(policy), expected) < 1e-6
    assert stats["trained_tokens"] == whole["trained_tokens"]
    assert stats["loss"] == pytest.approx(whole["loss"], rel=1e-5, abs=1e-6)
    calls.clear()
    learner.update(many())
    assert calls
    assert max(calls) <= 256


def test_cublas_says_it_in_its_own_words(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a run that ends because a library had no workspace; any other error taken for a lack
    of memory."""
    learner = open_learner(policy, micro_tokens=512)
    failing(policy, monkeypatch, lambda call, _: call == 1, RuntimeError)
    learner.update(many())
    assert learner.micro_tokens == 256
    monkeypatch.setattr(policy, "logprobs", lambda *_, **__: torch.zeros(2) + torch.zeros(3))
    with pytest.raises(RuntimeError, match="must match"):
        open_learner(policy, micro_tokens=512).update(many())


def test_out_of_memory_midway_starts_the_update_again(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: the gradient and the means of the micro-batches before the failure kept and added to
    the second attempt's."""
    whole = open_learner(policy, micro_tokens=512).update(many())
    expected = gradient(policy)
    stir(policy, 1)
    failing(policy, monkeypatch, lambda call, _: call == 2)
    learner = open_learner(policy, micro_tokens=512)
    stats = learner.update(many())
    assert learner.micro_tokens == 256
    assert distance(gradient(policy), expected) < 1e-6
    assert stats["trained_tokens"] == whole["trained_tokens"]
    assert stats["mismatch_kl"] == pytest.approx(whole["mismatch_kl"], rel=1e-5)


def test_out_of_memory_in_the_smallest_micro_batch_is_raised(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: halving without end, a step on half a gradient."""
    before = weights(policy)
    failing(policy, monkeypatch, lambda call, _: True)
    learner = open_learner(policy, micro_tokens=1024)
    with pytest.raises(torch.OutOfMemoryError):
        learner.update(many())
    assert learner.micro_tokens == MIN_MICRO_TOKENS
    assert same_bits(weights(policy), before)


# --- the stage as a whole


def test_a_restored_learner_goes_on_bitwise(folder: str, tmp_path: Path) -> None:
    """Invariant 8. Catches: a lost moment, update count, skip count, halved micro-batch, KL
    reference; state that JSON cannot hold."""
    settings: dict[str, Any] = {
        "beta": 0.1,
        "schedule": "cosine",
        "warmup": 0.2,
        "weight_decay": 0.01,
        "passes": 2,
        "steps": 5,
    }
    batches = [
        [group(20 + 2 * i, 1.0, 0.0, 0.0), group(21 + 2 * i, 0.0, 1.0, 0.5)] for i in range(5)
    ]
    straight = open_policy(folder)
    stir(straight, 1)
    straight.freeze_reference()
    (tmp_path / "reference").mkdir()
    straight.save(tmp_path / "reference")
    learner = open_learner(straight, **settings)
    for i, groups in enumerate(batches):
        learner.update(groups)
        if i == 1:
            learner.optimizer.skipped, learner.micro_tokens = 3, 512
            straight.save(tmp_path)
            tensors, plain = learner.state()
            save_file(tensors, tmp_path / "learner.safetensors")
            (tmp_path / "learner.json").write_text(json.dumps(plain))

    killed = open_policy(folder)
    killed.load(tmp_path / "reference")
    killed.freeze_reference()
    killed.load(tmp_path)
    restored = open_learner(killed, **settings)
    restored.load_state(
        load_file(tmp_path / "learner.safetensors"),
        json.loads((tmp_path / "learner.json").read_text()),
    )
    assert (restored.optimizer.skipped, restored.micro_tokens, restored.updates) == (3, 512, 4)
    for groups in batches[2:]:
        stats = restored.update(groups)
    assert same_bits(weights(killed), weights(straight))
    assert same_bits(restored.state()[0], learner.state()[0])
    assert stats["lr"] == learner.learning_rate(9)


COS = [
    0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(8)
]  # 1, .9619, .8536, .6913, .5, .3087, .1464, .0381


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0.2, [0.5] + [1.0] * 9),  # two updates of ten rise: 1/2, 2/2
        ("linear", 0.2, [0.5, 1.0, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ("cosine", 0.2, [0.5, 1.0, *COS]),
        ("linear", 0.0, [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]),
        ("constant", 0.03, [1.0] * 10),  # 0.3 of an update: one, at the full rate
        ("constant", 1.0, [k / 10 for k in range(1, 11)]),
    ],
)
def test_schedules_by_hand(
    policy: Policy, schedule: str, warmup: float, expected: list[float]
) -> None:
    """Catches: off by one, a first or last step at rate 0, a decay that does not start after the
    warm-up."""
    learner = open_learner(policy, lr=0.02, schedule=schedule, warmup=warmup, steps=10)
    assert [learner.learning_rate(u) for u in range(10)] == pytest.approx(
        [0.02 * e for e in expected]
    )


def test_the_schedule_counts_updates_and_reaches_the_optimizer(policy: Policy) -> None:
    """Catches: a schedule over steps where passes and minibatches make more updates, a rate that is
    logged but not applied."""
    learner = open_learner(policy, schedule="linear", steps=5, passes=2)  # 10 updates
    before = weights(policy)
    stats = learner.update([group(1, 1.0, 0.0)])
    assert stats["lr"] == pytest.approx(0.009)  # of the second update
    assert learner.optimizer.adapter.param_groups[0]["lr"] == stats["lr"]
    # AdamW's first update moves a weight by lr (0.01), its second by at most about as much again.
    moved = max(
        float((p.detach() - before[name]).abs().max()) for name, p in policy.trainable.items()
    )
    assert 0.0095 < moved < 0.0215
    learner = open_learner(policy, warmup=0.5, steps=8)
    before = weights(policy)
    learner.update([group(1, 1.0, 0.0)])  # 1/4 of the rate
    moved = max(
        float((p.detach() - before[name]).abs().max()) for name, p in policy.trainable.items()
    )
    assert moved == pytest.approx(0.0025, rel=1e-2)


@pytest.mark.parametrize("name", ["grpo", "dapo"])
def test_two_passes_of_two_minibatches_are_four_updates(
    folder: str, policy: Policy, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Catches: passes or minibatches ignored, old log-probabilities that follow the policy, a
    minibatch weighed as a whole step."""
    groups = on_policy([group(30 + i, 1.0, 0.0, 0.0) for i in range(4)], Plain(folder, policy))
    ratios: list[Tensor] = []
    weighed: list[float] = []
    compute = losses.policy_loss

    def spy(
        logprobs: Tensor, old: Tensor, advantages: Tensor, token_weights: Tensor, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        ratios.append((logprobs - old).exp().detach())
        weighed.append(float(token_weights.sum()))
        return compute(logprobs, old, advantages, token_weights, **kwargs)

    monkeypatch.setattr(losses, "policy_loss", spy)
    learner = open_learner(policy, loss=name, passes=2, minibatches=2, lr=0.02)
    stepped: list[int] = []
    learner.optimizer.adapter.register_step_post_hook(lambda *_: stepped.append(learner.updates))
    stats = learner.update(groups)
    assert stepped == [0, 1, 2, 3]
    assert learner.updates == 4
    assert torch.allclose(ratios[0], torch.ones(()), atol=1e-5)
    assert all(
        (r - 1).abs().max() > 1e-3 for r in ratios[1:]
    )  # the second minibatch meets weights that have moved
    halves = [
        sum(e.trained_tokens for g in half for e in g.episodes) for half in (groups[:2], groups[2:])
    ]
    assert [len(r) for r in ratios] == halves * 2
    assert weighed == pytest.approx([1.0] * 4)
    assert stats["trained_tokens"] == sum(halves)
    assert 0.0 <= stats["mismatch_kl"] < 1e-8  # measured before the first update alone
    assert stats["clip"] > 0.0


# --- does it learn


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "gspo", "rloo", "reinforce"])
def test_the_rewarded_arm_becomes_likely(folder: str, name: str) -> None:
    """A bandit: one sampled token, reward 1 for the second likeliest. Catches: a sign, an advantage
    given to another episode's tokens."""
    policy = open_policy(folder)
    learner = open_learner(
        policy, loss=name, lr=1e-2, steps=30, passes=2, temperature=0.25
    )  # cold: the tiny model is nearly uniform
    prompt, generator = tuple(range(20)), torch.Generator().manual_seed(0)

    def distribution() -> Tensor:
        with torch.no_grad():
            return torch.log_softmax(
                policy.model(input_ids=torch.tensor([prompt])).logits[0, -1] / 0.25, dim=-1
            )

    arm = int(distribution().argsort(descending=True)[1])
    start = distribution().exp()[arm].item()
    for _ in range(30):
        scores, problem = distribution(), Problem("bandit", "?", None)
        sampled = torch.multinomial(
            scores.exp(), 16, replacement=True, generator=generator
        ).tolist()
        turns = [
            (Turn("prompt", prompt), Turn("attempt", (t,), (scores[t].item(),), trained=True))
            for t in sampled
        ]
        episodes = tuple(
            Episode(problem, pair, float(t == arm)) for pair, t in zip(turns, sampled, strict=True)
        )
        learner.update([Group(problem, episodes)])
    end = distribution().exp()[arm].item()
    assert start < 0.25
    assert end > 0.9


def test_the_two_halves_of_online_self_training(policy: Policy, folder: str) -> None:
    """Each kind's mean over its own tokens, in the shares asked for, whatever their numbers; wrong
    attempts (no mask) are in neither."""
    sampled = [replace(e, reward=1.0) for e in group(1, 1.0, 1.0, 1.0).episodes]
    untrained = tuple(replace(turn, trained=False) for turn in group(4, 0.0).episodes[0].turns)
    wrong = replace(group(4, 0.0).episodes[0], turns=untrained)
    shown = [
        replace(e, turns=tuple(replace(t, logprobs=None) for t in e.turns))
        for e in group(2, None).episodes
    ]
    groups = [
        Group(sampled[0].problem, tuple(sampled)),
        Group(wrong.problem, (wrong,)),
        Group(shown[0].problem, tuple(shown)),
    ]
    plain = Plain(folder, policy)

    def mean(episodes: Sequence[Episode]) -> Tensor:
        logprobs = torch.cat([plain.logprobs(e)[0] for e in episodes])
        return -logprobs.sum() / len(logprobs)

    expected = {0.25: 0.25 * mean(sampled) + 0.75 * mean(shown), None: mean([*sampled, *shown])}
    for share, loss in expected.items():
        learner = open_learner(policy, loss="nll", sampled_share=share, lr=1e-12)
        assert learner.update(groups)["loss"] == pytest.approx(loss.item(), abs=1e-5)
        for name, gradient in plain.gradient(loss).items():
            torch.testing.assert_close(policy.trainable[name].grad, gradient, atol=1e-5, rtol=1e-4)
