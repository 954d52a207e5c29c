"""The judges of a run, of answers and of steps, and the models that they ask.

Invariant: a judge never stops a run: a server that fails leaves a step without a score. Afterwards
the policy's weights and adapter are what they were, and its sampler is empty.
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
from minirl.engine.sample.live import LiveSampler
from minirl.engine.sample.plain import PlainSampler
from minirl.engine.sample.scorer import Scorer
from minirl.episode import Ask, Completion, Problem
from minirl.judge.endpoint import EndpointSampler, Messages
from minirl.judge.judge import Asker, Judge, Opinion, StepCase, StepJudge
from minirl.judge.verdicts import Verdicts
from minirl.loop.open_model import open_model
from minirl.methods.swirl.rules import Rules
from minirl.rollout import Sampler

StepScores = Callable[[Sequence[StepCase], Sequence[Problem]], list[Opinion]]
"""An opinion on each step; the problems are for rules that may know the gold answer."""


class JudgeModel(NamedTuple):
    """A model that a judge asks.

    scorer: computes probabilities; None for a server, whose logits are not here.
    """

    name: str
    chat: Chat
    sampler: Sampler
    scorer: Scorer | None


class BaseSampler:
    """The policy's own sampler with the adapter switched off during a poll."""

    def __init__(self, policy: Policy, sampler: LiveSampler | PlainSampler) -> None:
        self._policy = policy
        self._sampler = sampler
        self._waiting: list[tuple[int, Ask]] = []

    def add(self, key: int, ask: Ask) -> None:
        """Queue an ask."""
        self._waiting.append((key, ask))

    def poll(self) -> list[tuple[int, Completion]]:
        """Answer all asks that wait."""
        self._sampler.reset()
        answers: list[tuple[int, Completion]] = []
        with without_adapter(self._policy):
            for key, ask in self._waiting:
                self._sampler.add(key, ask)
            while len(answers) < len(self._waiting):
                answers += self._sampler.poll()
            self._sampler.reset()
        self._waiting = []
        return answers


@contextmanager
def without_adapter(policy: Policy) -> Iterator[None]:
    """Inside, the model is the base model: LoRA's second factor is 0, as in a fresh adapter."""
    live = {name: p.data for name, p in policy.trainable.items() if ".lora_B." in name}
    try:
        for name in live:
            policy.trainable[name].data = torch.zeros_like(live[name])
        yield
    finally:
        for name, data in live.items():
            policy.trainable[name].data = data


class JudgeModels:
    """Opens the models that judges ask, each local one once."""

    def __init__(self, policy: Policy, chat: Chat, sampling: recipe.Sampling) -> None:
        self._policy = policy
        self._chat = chat
        self._sampling = sampling.model_copy(update={"cuda_graphs": False})
        self._local: dict[tuple[str, str, str], JudgeModel] = {}

    def open(self, judge: recipe.Judge, sampler: LiveSampler | PlainSampler) -> JudgeModel:
        """The model that a judge asks. sampler: the policy's."""
        if judge.kind == "endpoint":
            name = f"{judge.url} {judge.model}"
            return JudgeModel(name, Messages(), EndpointSampler(judge, patient=True), None)
        if judge.kind == "model":
            key = str(judge.model), judge.quantize, judge.dtype
            if key not in self._local:
                self._local[key] = self._load(*key)
            return self._local[key]
        policy, pad = self._policy, self._chat.tokenizer.pad_token_id
        return JudgeModel(
            f"base {models.fingerprint(policy.model)[:8]}",
            self._chat,
            BaseSampler(policy, sampler),
            Scorer(policy, pad=pad, inside=lambda: without_adapter(policy)),
        )

    def _load(self, name: str, quantize: str, dtype: str) -> JudgeModel:
        model = recipe.Model.model_validate(
            {"name": name, "quantize": quantize, "dtype": dtype, "lora": {"rank": 1}}
        )
        policy, chat, sampler, _ = open_model(model, self._sampling, 0, self._policy.device)
        digest = models.fingerprint(policy.model)
        scorer = Scorer(policy, pad=chat.tokenizer.pad_token_id)
        return JudgeModel(f"{name} {quantize} {digest[:8]}", chat, sampler, scorer)


def make_answer_judge(
    judge: recipe.Judge, model: JudgeModel, known: Verdicts | None = None
) -> Judge:
    """A judge of answers."""
    return Judge(
        Asker(model.chat, model.sampler, max_tokens=judge.max_tokens, known=known, name=model.name)
    )


def make_step_judge(
    judge: recipe.Judge, model: JudgeModel | None, rules: Rules, known: Verdicts
) -> StepScores:
    """A judge of steps; the rules if there is no model."""
    if model is None:
        return rules
    asker = Asker(
        model.chat, model.sampler, max_tokens=judge.max_tokens, known=known, name=model.name
    )
    ask = StepJudge(asker, model.chat, model.scorer if judge.verdict == "probability" else None)

    def give_opinions(cases: Sequence[StepCase], _: Sequence[Problem]) -> list[Opinion]:
        """A turn that is no action gets 0, whatever a judge would say: the method demands one
        action a turn."""
        are_actions = [rules.reads(case.message) for case in cases]
        given = iter(ask([case for case in cases if rules.reads(case.message)]))
        return [next(given) if is_action else Opinion(0.0) for is_action in are_actions]

    return give_opinions


def open_verdicts(folder: Path, process: int = 0, source: str | None = None) -> Verdicts:
    """The verdicts of a run folder. Each process of a run writes a file of its own, and knows what
    the others had written when it began.

    source: a run folder whose verdicts are known too.
    """
    own = folder / (f"verdicts-{process}.jsonl" if process else "verdicts.jsonl")
    folders = [folder, *([] if source is None else [Path(source).expanduser()])]
    paths = [path for one in folders for path in sorted(one.glob("verdicts*.jsonl"))]
    return Verdicts(own, [path for path in paths if path != own])
