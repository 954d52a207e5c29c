"""A trial: a finished run's adapter, or its base model, on the held-out problems.

Invariant: the run itself is left as it is; what is found is kept beside its own evaluations.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minirl import models, recipe
from minirl.chat import Chat
from minirl.errors import UserError
from minirl.evaluate import evaluate
from minirl.policy import Policy
from minirl.progress import Progress
from minirl.rundir import add_later_eval
from minirl.sampler import open_sampler
from minirl.session import eos, eval_settings, texts
from minirl.statistics import summarise
from minirl.tasks import open_task


class Evaluation(NamedTuple):
    """What `statistics.summarise` says, and the first episode of each problem as a row of episodes.jsonl, texts included."""

    summary: dict[str, Any]
    episodes: list[dict[str, Any]]


def evaluate_run(folder: Path, overrides: Sequence[str] = (), *, base: bool = False, progress: Progress | None = None) -> Evaluation:
    """Evaluate a run's final adapter, or with `base` its model as it was at the start, and keep the result beside it.

    overrides: `eval.samples=8` and the like, laid over the run's own recipe; the model's shape cannot change.
    """
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{folder}: no recipe.yaml there; expected a run folder, e.g. runs/r3_countdown")
    node = recipe.load(folder / "recipe.yaml", overrides)
    if not base:
        if not (folder / "adapter").is_dir():
            raise UserError(f"{folder}: no adapter yet; finish the run first (the same `minirl run` takes it up again), or use --base")
        node = node.model_copy(update={"model": node.model.model_copy(update={"adapter": str(folder / "adapter")})})
    loaded = models.load_model(node.model, node.seed)
    chat, policy = Chat(loaded.tokenizer, eos=eos(loaded.model)), Policy(loaded.model, loaded.device, loaded.dtype)
    task = open_task(node.task, node.seed)
    with progress or Progress() as shown:
        shown.say(models.describe(loaded))
        sampler = open_sampler(
            policy, chat, rows=node.sampling.rows, cache_tokens=node.sampling.cache_tokens, cuda_graphs=node.sampling.cuda_graphs
        )
        label = "base" if base else "adapter"
        rows, episodes = evaluate(task.held_out[: node.eval.problems], task, chat, sampler, node.sampling, node.eval, node.seed)
        row = {"label": label, "stage": len(node.stages), "step": 0} | eval_settings(node.eval)
        row |= {"changed": [text for text in overrides if not text.startswith("eval.")], "problems": rows}
        summary = summarise(row)
        shown.evaluation(label, summary)
        add_later_eval(folder, row)
    return Evaluation(summary, [{"label": label, **e.to_json(), "texts": texts(chat, e)} for e in episodes])
