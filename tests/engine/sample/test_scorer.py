"""The scorer: the chance of one reply against another, from a model's own logits."""

from __future__ import annotations

import pytest
import torch
from tiny import save_tiny

from minirl import recipe
from minirl.chat import Chat
from minirl.engine.model import load as models
from minirl.engine.model.policy import Policy
from minirl.engine.sample.scorer import Scorer
from minirl.judge.judge import BAD, GOOD
from minirl.loop.judges import without_adapter

PROMPTS = [
    (256, *b"user Is it good? First."),
    (256, *b"user Is it good? Another, longer one."),
    (256, *b"user What now?"),
]
GROUPS = [0, 0, 1]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Policy, Chat]:
    folder = save_tiny(tmp_path_factory.mktemp("model"))
    loaded = models.load_model(recipe.Model(name=str(folder), dtype="fp32"), 0, torch.device("cpu"))
    return Policy(loaded.model, loaded.device, loaded.dtype), Chat(loaded.tokenizer)


@torch.no_grad()
def directly(policy: Policy, options: tuple[tuple[int, ...], tuple[int, ...]]) -> list[float]:
    """One prompt with one option at a time, through the model as it is."""
    chances = []
    for prompt in PROMPTS:
        totals = []
        for option in options:
            with policy.plain_attention():
                logits = (
                    policy.model(input_ids=torch.tensor([[*prompt, *option]]))
                    .logits[0]
                    .float()
                    .log_softmax(-1)
                )
            totals.append(
                sum(float(logits[len(prompt) - 1 + k, token]) for k, token in enumerate(option))
            )
        chances.append(float(torch.sigmoid(torch.tensor(totals[0] - totals[1]))))
    return chances


def test_chances_are_those_of_a_direct_forward(policy: tuple[Policy, Chat]) -> None:
    """Catches: options the wrong way round, prompts mixed up between groups, a token too many or
    too few."""
    model, chat = policy
    good, bad = chat.inside(GOOD), chat.inside(BAD)
    assert len(good) != len(bad)
    scorer = Scorer(model, pad=258)
    found = scorer(PROMPTS, (good, bad), GROUPS)
    assert found == pytest.approx(directly(model, (good, bad)), abs=1e-5)
    assert len({round(chance, 6) for chance in found}) == 3
    assert scorer(PROMPTS, (bad, good), GROUPS) == pytest.approx(
        [1 - chance for chance in found], abs=1e-5
    )


def test_the_base_scores_without_the_adapter(policy: tuple[Policy, Chat]) -> None:
    model, chat = policy
    options = chat.inside(GOOD), chat.inside(BAD)
    fresh = Scorer(model, pad=258)(PROMPTS, options, GROUPS)
    with torch.no_grad():
        for name, weights in model.trainable.items():
            weights += 0.5 * torch.randn(
                weights.shape, generator=torch.Generator().manual_seed(len(name))
            )
    trained = Scorer(model, pad=258)(PROMPTS, options, GROUPS)
    assert trained != pytest.approx(fresh, abs=1e-3)
    assert Scorer(model, pad=258, inside=lambda: without_adapter(model))(
        PROMPTS, options, GROUPS
    ) == pytest.approx(fresh, abs=1e-6)
