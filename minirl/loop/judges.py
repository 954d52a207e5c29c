"""The judges of a run, opened: of answers and of steps.

Invariant: a judge never stops a run: a server that fails leaves a step without a score. The
policy's weights, its adapter and what its sampler holds are afterwards what they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from minirl import recipe
from minirl.chat import Chat
from minirl.engine.model import load as models
from minirl.engine.model.policy import Policy
from minirl.engine.sample.live import LiveSampler, open_sampler
from minirl.engine.sample.plain import PlainSampler
from minirl.engine.sample.scorer import Scorer
from minirl.episode import Ask, Completion, Problem
from minirl.judge.endpoint import EndpointSampler, Messages
from minirl.judge.judge import Asker, Judge, Opinion, StepCase, StepJudge
from minirl.judge.verdicts import Verdicts
from minirl.methods.swirl.rules import Rules
from minirl.rollout import Sampler

StepScores = Callable[[Sequence[StepCase], Sequence[Problem]], list[Opinion]]
"""An opinion on each step; the problems are for rules that may know the gold answer."""


class Voice(NamedTuple):
    """A model that can be asked: its chat, its sampler, and for probabilities what computes them
    (None where its logits are elsewhere)."""

    name: str
    chat: Chat
    sampler: Sampler
    scorer: Scorer | None


class BaseSampler:
    """The policy's own sampler with the adapter off: between two polls of it the weights and the
    cache are the adapter's again."""

    def __init__(self, policy: Policy, sampler: LiveSampler | PlainSampler) -> None:
        self._policy = policy
        self._sampler = sampler
        self._waiting: list[tuple[int, Ask]] = []

    def add(self, key: int, ask: Ask) -> None:
        """Queue an ask."""
        self._waiting.append((key, ask))

    def poll(self) -> list[tuple[int, Completion]]:
        """Answer all that wait."""
        self._sampler.reset()
        answers: list[tuple[int, Completion]] = []
        with bare(self._policy):
            for key, ask in self._waiting:
                self._sampler.add(key, ask)
            while len(answers) < len(self._waiting):
                answers += self._sampler.poll()
            self._sampler.reset()
        self._waiting = []
        return answers


@contextmanager
def bare(policy: Policy) -> Iterator[None]:
    """Inside, the model computes without what its adapter has learned: LoRA's second factor is 0,
    as in a fresh one."""
    live = {name: p.data for name, p in policy.trainable.items() if ".lora_B." in name}
    try:
        for name in live:
            policy.trainable[name].data = torch.zeros_like(live[name])
        yield
    finally:
        for name, data in live.items():
            policy.trainable[name].data = data


class Voices:
    """Opens the other models of a run, each local one once."""

    def __init__(
        self, policy: Policy, chat: Chat, *, rows: int, cache_tokens: int | None = None
    ) -> None:
        self._policy = policy
        self._chat = chat
        self._rows = rows
        self._cache_tokens = cache_tokens
        self._local: dict[tuple[str, str, str], Voice] = {}

    def open(self, node: recipe.Judge, sampler: LiveSampler | PlainSampler) -> Voice:
        """The model that a recipe names. sampler: the policy's."""
        if node.kind == "endpoint":
            return Voice(
                f"{node.url} {node.model}", Messages(), EndpointSampler(node, patient=True), None
            )
        if node.kind == "model":
            key = str(node.model), node.quantize, node.dtype
            if key not in self._local:
                self._local[key] = self._load(*key)
            return self._local[key]
        scorer = Scorer(self._policy, pad=_pad(self._chat), inside=lambda: bare(self._policy))
        return Voice(
            f"base {models.fingerprint(self._policy.model)[:8]}",
            self._chat,
            BaseSampler(self._policy, sampler),
            scorer,
        )

    def _load(self, name: str, quantize: str, dtype: str) -> Voice:
        node = recipe.Model.model_validate(
            {"name": name, "quantize": quantize, "dtype": dtype, "lora": {"rank": 1}}
        )
        loaded = models.load_model(node, 0, self._policy.device)
        chat = Chat(loaded.tokenizer, eos=models.eos(loaded.model))
        policy = Policy(loaded.model, loaded.device, loaded.dtype)
        sampler = open_sampler(policy, chat, rows=self._rows, cache_tokens=self._cache_tokens)
        name = f"{name} {quantize} {models.fingerprint(loaded.model)[:8]}"
        return Voice(name, chat, sampler, Scorer(policy, pad=_pad(chat)))


def answer_judge(node: recipe.Judge, voice: Voice, known: Verdicts | None = None) -> Judge:
    """A judge of answers."""
    return Judge(
        voice.chat, voice.sampler, max_tokens=node.max_tokens, known=known, name=voice.name
    )


def step_judge(
    node: recipe.Judge, voice: Voice | None, rules: Rules, known: Verdicts
) -> StepScores:
    """A judge of steps; without a voice the rules."""
    if voice is None:
        return rules
    asker = Asker(
        voice.chat, voice.sampler, max_tokens=node.max_tokens, known=known, name=voice.name
    )
    judge = StepJudge(asker, voice.chat, voice.scorer if node.verdict == "probability" else None)

    def opinions(cases: Sequence[StepCase], _: Sequence[Problem]) -> list[Opinion]:
        """A turn that is no action is bad, whatever a judge would say: one action a turn is the
        method's law."""
        given = iter(judge([case for case in cases if rules.reads(case.message)]))
        return [next(given) if rules.reads(case.message) else Opinion(0.0) for case in cases]

    return opinions


def verdicts_of(folder: Path, process: int = 0, source: str | None = None) -> Verdicts:
    """The verdicts of a run folder; each process of a run writes a file of its own, and knows those
    that the others had when it began.

    source: a run folder whose verdicts are known too.
    """
    own = folder / (f"verdicts-{process}.jsonl" if process else "verdicts.jsonl")
    folders = [folder, *([] if source is None else [Path(source).expanduser()])]
    return Verdicts(
        own,
        [path for one in folders for path in sorted(one.glob("verdicts*.jsonl")) if path != own],
    )


def _pad(chat: Chat) -> int:
    return int(chat.tokenizer.pad_token_id)
