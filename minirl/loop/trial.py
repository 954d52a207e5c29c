"""A trial: a finished run's adapter, or its base model, on the held-out problems, by the run's own
method or by another.

Invariant: the run itself is left as it is; what is found is kept beside its own evaluations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from minirl import recipe
from minirl.chat import Chat
from minirl.engine.learn.reward_model import RewardModel
from minirl.engine.model import load as models
from minirl.engine.model.policy import Policy
from minirl.engine.sample.live import LiveSampler, open_sampler
from minirl.engine.sample.plain import PlainSampler
from minirl.errors import UserError
from minirl.io.files import read_rows
from minirl.judge.judge import Judge
from minirl.loop.evaluate import evaluate
from minirl.loop.judges import Voices, answer_judge, verdicts_of
from minirl.loop.session import eval_settings, texts
from minirl.methods import use_own
from minirl.recipe.own import OWN
from minirl.record.closed_run import add_later_eval, problems_digest
from minirl.record.evals import pool, summarise
from minirl.record.measures import SCORES
from minirl.record.progress import Progress
from minirl.record.statistics import Interval
from minirl.tasks import Task, fingerprint, open_task

RECORDED = ("eval.tries", "eval.samples", "eval.temperature", "eval.problems", "eval.vote")
"""What a row says in places of its own; any other override tells how an evaluation was made."""
BASELINES = ("no_rag", "naive_rag", "iter_retgen", "ircot")


class Evaluation(NamedTuple):
    """What `evals.summarise` says, the first episode of each problem as a row of
    episodes.jsonl, texts included, and what was kept."""

    summary: dict[str, Any]
    episodes: list[dict[str, Any]]
    row: dict[str, Any]


class Opened(NamedTuple):
    """A run's task with its model, under a label: "base" or "adapter"."""

    folder: Path
    label: str
    chat: Chat
    task: Task
    policy: Policy
    sampler: LiveSampler | PlainSampler
    judge: Judge | None
    rank: RewardModel | None = None


def evaluate_run(
    folder: Path,
    overrides: Sequence[str] = (),
    *,
    base: bool = False,
    method: str | Callable[..., Any] | None = None,
    samples: int | None = None,
    vote: bool = False,
    rerank: Path | None = None,
    task: Path | Task | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluate a run's final adapter, or with `base` its model as it was at the start, and keep the
    result beside it.

    overrides: `eval.samples=8` and the like, laid over the run's own recipe; the model's shape
    cannot change. method: as in `eval.method`, e.g. a baseline that retrieves, or a function.
    samples: of each problem, at the temperature of training where the recipe evaluates greedily.
    vote: as `eval.vote`. rerank: a run with a reward model, which picks one of the samples.
    task: another recipe, whose task, sampling and evaluation take the place of the run's own,
    overrides laid over them: what was trained on one task is tried on another; or the Task of a
    run with `task: {name: own}`.
    """
    made, task = (task, None) if isinstance(task, Task) else (None, task)
    given, method = (method, OWN) if callable(method) else (None, method)
    overrides = [
        *overrides,
        *([f"eval.samples={samples}"] if samples is not None else []),
        *(["eval.vote=true"] if vote else []),
    ]
    node = _evaluated(folder, task, overrides, method, warm=samples is not None and samples > 1)
    use_own(node, given, uses=("eval",))
    changed = [*overrides, *([] if task is None else [f"recipe={task.stem}"])]
    if rerank is not None and (node.eval.samples < 2 or node.eval.tries == 2):
        raise UserError(
            f"--rerank: got {node.eval.samples} samples of {node.eval.tries} tries, expected at"
            " least 2 samples of one try; add --samples 8"
        )
    with progress or Progress() as shown:
        rank = None if rerank is None else _open_reward_model(rerank, node)
        opened = _open(folder, node, shown, base=base, made=made)._replace(rank=rank)
        return _evaluate(
            opened,
            node,
            changed,
            method,
            shown,
            [*["vote"] * node.eval.vote, *([f"rerank {rerank}"] if rerank else [])],
        )


def _evaluated(
    folder: Path, task: Path | None, overrides: Sequence[str], method: str | None, *, warm: bool
) -> recipe.Recipe:
    """The recipe that is evaluated: the run's own, or another's with the run's model.

    warm: with the temperature of training, that recipe's own, in place of 0, at which all samples
    would be equal.
    """

    def load(texts: Sequence[str]) -> recipe.Recipe:
        return (
            _recipe(folder, texts, method)
            if task is None
            else _transferred(folder, task, texts, method)
        )

    if not warm:
        return load(overrides)
    single = load(
        [text for text in overrides if not text.startswith(("eval.samples=", "eval.vote="))]
    )
    return load(
        [
            *(
                [f"eval.temperature={single.sampling.temperature}"]
                if single.eval.temperature == 0
                else []
            ),
            *overrides,
        ]
    )


def _open_reward_model(folder: Path, node: recipe.Recipe) -> RewardModel:
    """That of another run, if it reads the same tokens."""
    theirs = _recipe(folder, (), None).model
    if (theirs.name, theirs.template) != (node.model.name, node.model.template):
        raise UserError(
            f"--rerank: {folder} reads {theirs.name} ({theirs.template}), expected the model of the"
            f" run, {node.model.name}"
        )
    return RewardModel.open(folder / "reward_model", theirs)


def compare_methods(
    folder: Path,
    overrides: Sequence[str] = (),
    *,
    task: Path | None = None,
    progress: Progress | None = None,
) -> list[Evaluation]:
    """ReSearch's table for a run's data set (arXiv 2503.19470, table 1): the baselines and search
    with the base model, then search with the adapter, where the run has made one. Each result is
    kept beside the run. task: another recipe, as for `evaluate_run`.
    """
    changed = [*overrides, *([] if task is None else [f"recipe={task.stem}"])]
    adapter = (folder / "adapter").is_dir()
    wanted = [(True, (*BASELINES, "search")), *([(False, ("search",))] if adapter else [])]
    read = partial(_recipe, folder) if task is None else partial(_transferred, folder, task)
    nodes = {method: read(overrides, method) for method in (*BASELINES, "search")}
    with progress or Progress() as shown:
        found = []
        for base, methods in wanted:
            opened = _open(folder, nodes["search"], shown, base=base)
            found += [
                _evaluate(opened, nodes[method], changed, method, shown) for method in methods
            ]
    warm_up = [] if task else _warm_up(folder, nodes["search"], found[len(BASELINES)].row)
    return [*found[: len(wanted[0][1])], *warm_up, *found[len(wanted[0][1]) :]]


def _warm_up(folder: Path, node: recipe.Recipe, alike: dict[str, Any]) -> list[Evaluation]:
    """What the run itself measured after its warm-up, where it did so on the problems of `alike`,
    an evaluation of search, in its way."""
    labels = [
        f"{n}-{stage.method}"
        for n, stage in enumerate(node.stages)
        if isinstance(stage, recipe.Train) and not stage.facts.samples
    ]
    path = folder / "evals.jsonl"
    rows = [
        row for row in (read_rows(path) if path.exists() else []) if row.get("label") in labels[-1:]
    ]

    def way(row: dict[str, Any]) -> tuple[Any, ...]:
        return *(row[name] for name in eval_settings(node.eval)), [
            problem["id"] for problem in row["problems"]
        ]

    own = _recipe(folder, (), None).eval.method in (None, "search") and alike["changed"] == [
        "eval.method=search"
    ]
    if not own or not rows or way(rows[-1]) != way(alike):
        return []
    row = rows[-1] | {"label": "warm-up", "changed": alike["changed"]}
    return [Evaluation(summarise(row) | {"method": "search"}, [], row)]


def compare_runs(
    folders: Sequence[Path],
    overrides: Sequence[str] = (),
    *,
    task: Path | None = None,
    progress: Progress | None = None,
) -> list[Evaluation]:
    """`compare_methods` over runs of one recipe with several seeds, each line pooled over them (see
    `evals.pool`)."""
    nodes = [_recipe(folder, (), None) for folder in folders]
    bare = [
        node.model_copy(
            update={"seed": 0, "model": node.model.model_copy(update={"adapter": None})}
        )
        for node in nodes
    ]
    if any(node != bare[0] for node in bare) or len({node.seed for node in nodes}) < len(nodes):
        seeds = ", ".join(str(node.seed) for node in nodes)
        raise UserError(
            f"--table: got {len(folders)} runs with the seeds {seeds}, expected runs of one recipe"
            " that differ in the seed alone"
        )
    tables = [
        compare_methods(folder, overrides, task=task, progress=progress) for folder in folders
    ]
    if len(tables) == 1:
        return tables[0]
    by_line = [{(e.summary["label"], e.summary["method"]): e for e in found} for found in tables]
    pooled = [
        (e[0], pool([one.row for one in e]))
        for key in by_line[0]
        if len(e := [t[key] for t in by_line if key in t]) == len(tables)
    ]
    return [
        Evaluation(summarise(row) | {"method": first.summary["method"]}, first.episodes, row)
        for first, row in pooled
    ]


def _recipe(folder: Path, overrides: Sequence[str], method: str | None) -> recipe.Recipe:
    if not (folder / "recipe.yaml").is_file():
        raise UserError(
            f"{folder}: no recipe.yaml there; expected a run folder, e.g. runs/r3_countdown"
        )
    return recipe.load(
        folder / "recipe.yaml", [*overrides, *([f"eval.method={method}"] if method else [])]
    )


def _transferred(
    folder: Path, task: Path, overrides: Sequence[str], method: str | None
) -> recipe.Recipe:
    """Another recipe with the run's model; laid out for the machine that this is, like any
    recipe."""
    path = task if torch.cuda.is_available() else recipe.cpu_form(task)
    other = recipe.load(path, [*overrides, *([f"eval.method={method}"] if method else [])])
    return other.model_copy(update={"model": _recipe(folder, (), None).model})


def _open(
    folder: Path, node: recipe.Recipe, shown: Progress, *, base: bool, made: Task | None = None
) -> Opened:
    if not base:
        if not (folder / "adapter").is_dir():
            raise UserError(
                f"{folder}: no adapter yet; finish the run first (the same `minirl run` takes it up"
                " again), or use --base"
            )
        node = node.model_copy(
            update={"model": node.model.model_copy(update={"adapter": str(folder / "adapter")})}
        )
    task = open_task(node.task, node.seed, made)
    if made is None and (warning := _other_problems(folder, node, task)):
        shown.say(warning)
    loaded = models.load_model(node.model, node.seed)
    chat = Chat(
        loaded.tokenizer, eos=models.eos(loaded.model), plain=node.model.template == "plain"
    )
    policy = Policy(loaded.model, loaded.device, loaded.dtype)
    for line in (models.describe(loaded), *task.notes):
        shown.say(line)
    sampling = node.sampling
    sampler = open_sampler(
        policy,
        chat,
        rows=sampling.rows,
        cache_tokens=sampling.cache_tokens,
        cuda_graphs=sampling.cuda_graphs,
    )
    opened = Opened(folder, "base" if base else "adapter", chat, task, policy, sampler, None)
    return opened._replace(judge=_judge(opened, node))


def _other_problems(folder: Path, node: recipe.Recipe, task: Task) -> str:
    """A warning where the run's own task has other problems now than when it was trained: it may be
    tried on what it was trained on."""
    own, known = _recipe(folder, (), None), problems_digest(folder)
    if (node.task, node.seed) != (own.task, own.seed) or known in (None, now := fingerprint(task)):
        return ""
    return (
        f"WARNING: the task {node.task.name} has other problems here than the run had (digest"
        f" {now[:8]}, the run's {str(known)[:8]}); some of those held out now may have been"
        " trained on"
    )


def _judge(opened: Opened, node: recipe.Recipe) -> Judge | None:
    judge, sampling = node.eval.judge, node.sampling
    if judge is None:
        return None
    voices = Voices(
        opened.policy, opened.chat, rows=sampling.rows, cache_tokens=sampling.cache_tokens
    )
    return answer_judge(judge, voices.open(judge, opened.sampler), verdicts_of(opened.folder))


def _evaluate(
    opened: Opened,
    node: recipe.Recipe,
    overrides: Sequence[str],
    method: str | None,
    shown: Progress,
    more: Sequence[str] = (),
) -> Evaluation:
    """more: what else tells this evaluation from others, beside the overrides."""
    chat, task, label = opened.chat, opened.task, opened.label
    opened.sampler.reset()
    problems = task.held_out[: node.eval.problems]
    rows, episodes = evaluate(
        problems,
        task,
        chat,
        opened.sampler,
        node.sampling,
        node.eval,
        node.seed,
        opened.judge,
        opened.rank,
    )
    if (judge := opened.judge) is not None and judge.unreadable + judge.unanswered:
        of = (
            f"{judge.unreadable + judge.unanswered} of {len(problems) * node.eval.samples} answers"
            " have no verdict"
        )
        shown.say(
            f"WARNING: judge: {of} ({judge.unanswered} unanswered, {judge.unreadable} unreadable);"
            " `judged` is over the others"
        )
    row = {"label": label, "stage": len(node.stages), "step": 0} | eval_settings(node.eval)
    changed = [text for text in overrides if text.partition("=")[0] not in RECORDED]
    changed += [f"eval.method={method}"] if method else []
    row |= {"changed": list(dict.fromkeys([*changed, *more])), "problems": rows}
    summary = summarise(row)
    shown.evaluation(f"{label}, {method}" if method else label, summary)
    add_later_eval(opened.folder, row)
    kept = [{"label": label, **e.to_json(), "texts": texts(chat, e)} for e in episodes]
    return Evaluation(summary | {"method": method}, kept, row)


def table(found: Sequence[Evaluation]) -> str:
    """ReSearch's table as text, a line an evaluation: percent and searches an episode, with 95 %
    intervals. `judged` is a share of the answers that have a verdict: how many of all these are
    stands beside it, and where methods differ in it their shares do not compare.

    Above it what all of them share: how many problems, and what differs from the run's own recipe
    (see `evaluate_run`).
    """
    shared = [
        text for text in found[0].row["changed"] if all(text in e.row["changed"] for e in found)
    ]
    names = [
        name
        for name in ("em", "f1", "judged", "recall", "searches")
        if any(name in e.summary["scores"] for e in found)
    ]
    lines = [["model", "method", *names]]
    for evaluation in found:
        said = evaluation.summary
        lines.append(
            [str(said["label"]), str(said["method"]), *(_cell(name, said) for name in names)]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    runs = [f"{found[0].row['runs']} runs"] if "runs" in found[0].row else []
    return "\n".join(
        [", ".join([f"{found[0].summary['problems']} held-out problems", *runs, *shared]), *shown]
    )


def _cell(name: str, said: dict[str, Any]) -> str:
    found: Interval | None = said["scores"].get(name)
    if found is None:
        return "-"
    if SCORES[name].kind == "count":
        return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"
    share = f"{100 * found.value:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"
    return (
        share
        if name != "judged"
        else f"{share} ({said['counted'][name]} of {said['problems'] * said['samples']})"
    )
