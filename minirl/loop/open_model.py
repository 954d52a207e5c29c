"""A model opened for sampling: policy, chat and sampler.

Invariant: every model of a run, judges' models too, is opened here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from minirl.chat import Chat
from minirl.engine.model import load as models
from minirl.engine.model.policy import Policy
from minirl.engine.sample.live import LiveSampler, open_sampler
from minirl.engine.sample.plain import PlainSampler
from minirl.recipe import Model, Sampling


class OpenModel(NamedTuple):
    """description: a line for the user."""

    policy: Policy
    chat: Chat
    sampler: LiveSampler | PlainSampler
    description: str


def open_model(
    model: Model, sampling: Sampling, seed: int = 0, device: torch.device | None = None
) -> OpenModel:
    """Load a model with its adapter. Raises UserError if it cannot be had."""
    loaded = models.load_model(model, seed, device)
    chat = Chat(loaded.tokenizer, eos=models.eos(loaded.model), plain=model.template == "plain")
    policy = Policy(loaded.model, loaded.device, loaded.dtype)
    sampler = open_sampler(
        policy,
        chat,
        rows=sampling.rows,
        cache_tokens=sampling.cache_tokens,
        cuda_graphs=sampling.cuda_graphs,
    )
    return OpenModel(policy, chat, sampler, models.describe(loaded))
