"""The search recipes: each runs through all its stages, in its form for a CPU, with a tiny model
that writes by a script.

The sampler, its log-probabilities, the searches, the rewards and the updates are real: only which
token is drawn is not left to chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import Start, minirl
from torch import Tensor

from minirl import recipe as recipes
from minirl.episode import Ask
from minirl.io.files import read_rows

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
SOURCES = {
    "research_hotpotqa": ("hotpotqa/train_100.json", "hotpotqa/dev_distractor_100.jsonl"),
    "research_musique": ("musique/train_100.json", "musique/train_100.json"),
    "search_r1": ("hotpotqa/train_100.json", "hotpotqa/dev_distractor_100.jsonl"),
}
SEARCH = "<think> Who? </think>\n<search> director of the film </search>"
GRID = 512  # token ids as numbers in [0, 1) that float32 holds exactly

pytestmark = pytest.mark.skipif(not DATA.exists(), reason="no ../shared/data")


def script(ask: Ask) -> list[float]:
    """What is drawn in place of chance: a search first, then an answer, every other time in bad
    form; then nothing but end markers."""
    from tiny import IM_END

    said = bytes(token for token in ask.tokens if token < 256).rpartition(b"assistant\n")[2]
    found = said.count(b"</result>") + said.count(b"</information>")
    answer = (
        "<answer> Ada" if ask.seed % 2 else "<think> She. </think> <answer>\\boxed{Ada}</answer>"
    )
    tokens = [*(answer if found else SEARCH).encode(), *[IM_END] * ask.max_tokens]
    return [token / GRID for token in tokens[: ask.max_tokens]]


def recited(logits: Tensor, temperature: Sequence[float], uniform: Tensor) -> tuple[Tensor, Tensor]:
    """`sampling.pick` of the scripted tokens, with the model's own log-probabilities."""
    chosen = (uniform * GRID).long()
    return chosen, logits.log_softmax(-1).gather(-1, chosen[:, None]).squeeze(-1)


def run_by_script(*argv: str) -> None:
    """The command line, over a sampler that draws what the script says."""
    from minirl.engine.sample import draw

    draw.uniforms, draw.pick = script, recited
    minirl(*argv)


@pytest.mark.slow
@pytest.mark.parametrize("name", SOURCES)
def test_every_recipe_runs(start: Start, tiny: Path, tmp_path: Path, name: str) -> None:
    train, test = SOURCES[name]
    sets = {
        "model.name": tiny,
        "model.dtype": "fp32",
        "task.source": DATA / train,
        "task.test_source": DATA / test,
    }
    sets |= {
        "task.train": 30,
        "task.held_out": 3,
        "task.floor": 0.1,
        "task.retriever.cache": "false",
        "eval.problems": 3,
    }
    sets |= {"sampling.attempt_tokens": 500, "sampling.result_tokens": 60}
    for number in range(2):
        sets |= {
            f"stages.{number}.steps": 2,
            f"stages.{number}.batch": 3,
            f"stages.{number}.group": 1 + 2 * number,
        }
    options = [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]
    folder = tmp_path / "run"
    outcome = start(
        run_by_script, "run", str(ROOT / "recipes" / f"{name}.yaml"), *options, "--out", str(folder)
    ).wait()
    assert outcome.code == 0, outcome.err
    assert "gold paragraphs among them: 100.0%" in outcome.out
    assert "WARNING" not in outcome.out, (
        "sampler, shared prefixes and plain rows agree on episodes with searches"
    )
    shown, trained = (
        [row for row in read_rows(folder / "metrics.jsonl") if row["stage"] == stage]
        for stage in range(2)
    )
    assert len(shown) == len(trained) == 2
    assert all(row["searches"] >= 2.0 and row["grad_norm"] > 0 for row in shown), (
        "a search for each supporting paragraph"
    )
    for row in trained:
        assert 0 < row["reward"] < 0.1, "good form is worth 0.1, bad form nothing"
        assert row["dead"] < row["groups"], "some groups have both"
        assert (row["searches"], row["grad_norm"] > 0) == (1.0, True)
        assert row["response"] > row["length"] > len(SEARCH), (
            "results are in the response, and not among what is trained"
        )
        assert abs(row["mismatch_kl"]) < 1e-4
    evaluated = read_rows(folder / "evals.jsonl")
    assert [row["label"] for row in evaluated] == ["0-demonstrate", "1-search"]
    assert all(
        problem["scores"]["searches"] == [1.0] for row in evaluated for problem in row["problems"]
    )
    assert recipes.load(folder / "recipe.yaml").task.name == (
        "musique" if "musique" in name else "hotpotqa"
    )
