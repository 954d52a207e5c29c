"""The one loop: the only file that knows both wings.

Invariant: what a step does is a function of the recipe, the weights and the step's number, so a run that was killed and taken up again
writes the same bytes as one that was not.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file

from minirl import models, recipe
from minirl.chat import Chat
from minirl.episode import Episode, Group, Problem, regroup
from minirl.errors import UserError
from minirl.evaluate import evaluate
from minirl.files import write_folder
from minirl.learner import Learner
from minirl.methods import method_of
from minirl.methods.reflect import failed
from minirl.methods.single import single
from minirl.plain import PlainSampler
from minirl.policy import Policy
from minirl.progress import Progress
from minirl.report import write_report
from minirl.rollout import Play, Talk, play, seed_of
from minirl.rundir import Run, add_later_eval
from minirl.sampler import LiveSampler, open_sampler
from minirl.state import Position
from minirl.statistics import summarise
from minirl.tasks import Task, draw, open_task

_NOTHING = object()  # fills a share that is shorter than the others
LEARNER_TENSORS, LEARNER_STATE = "learner.safetensors", "learner.json"


class Interrupted(Exception):  # noqa: N818 - not an error
    """The user pressed Ctrl-C: everything up to the last finished step is saved."""


@dataclass(slots=True)
class Session:
    """What every stage of a run shares."""

    recipe: recipe.Recipe
    run: Run
    accelerator: Accelerator
    policy: Policy
    chat: Chat
    task: Task
    sampler: LiveSampler | PlainSampler
    progress: Progress
    stop: bool = field(default=False)

    def mine(self, items: Sequence[Any]) -> Sequence[Any]:
        """This process's share."""
        return items[self.accelerator.process_index :: self.accelerator.num_processes]

    def gather(self, items: Sequence[Any]) -> list[Any]:
        """Everybody's items, in the order in which `mine` dealt them out."""
        if self.accelerator.num_processes == 1:
            return list(items)
        rounds = zip_longest(*gather_object([list(items)]), fillvalue=_NOTHING)
        return [item for dealt in rounds for item in dealt if item is not _NOTHING]

    def asked_to_stop(self) -> bool:
        """Whether anybody was asked to; all processes of a run learn it at the same step, or the others would wait for ever."""
        asked = torch.tensor(float(self.stop), device=self.accelerator.device)
        # Not written back to `stop`: a signal that comes while this waits for the others would be lost.
        return bool(self.accelerator.reduce(asked, "sum").item())

    def talk(self, problem: Problem, seed: str, *, temperature: float | None = None) -> Talk:
        sampling = self.recipe.sampling
        temperature = sampling.temperature if temperature is None else temperature
        return Talk(problem, self.chat, sampling, temperature=temperature, seed=f"{self.recipe.seed}/{seed}")

    def play(self, plays: Sequence[Play]) -> list[Episode]:
        done = 0
        self.sampler.reset()  # so that a step does not depend on what was sampled before it

        def count(_: Episode) -> None:
            nonlocal done
            done += 1
            self.progress.sampling(done, len(plays))

        return play(plays, self.sampler, on_done=count)


def train(node: recipe.Recipe, folder: Path, progress: Progress | None = None) -> Path:
    """Run a recipe in a folder to its end, from wherever that folder stands; the folder of the final adapter.

    Raises UserError for what the user can mend, Interrupted after a Ctrl-C once the step in hand is saved.
    """
    if missing := sorted(set(node.track) - {str(name) for name in get_available_trackers()}):  # accelerate would leave it out silently
        raise UserError(f"track: got {missing[0]!r}, which is not installed; `pip install {missing[0]}` or take it out of the list")
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), log_with=list(node.track) or None, project_dir=str(folder))
    if accelerator.is_main_process:
        run = Run.open(folder, node)
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        run = Run.open(folder, node, main=False)
    with run, progress or Progress(quiet=not accelerator.is_main_process) as shown:
        if run.finished:
            shown.say(f"{folder}: finished already; use another --out to run again")
            return folder / "adapter"
        session = _session(node, run, accelerator, shown)
        try:
            with _interruptible(session):
                _run_stages(session)
            _finish(session)
        finally:
            accelerator.end_training()  # trackers write out what they still hold
    return folder / "adapter"


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
    chat, policy = Chat(loaded.tokenizer, eos=_eos(loaded.model)), Policy(loaded.model, loaded.device, loaded.dtype)
    task = open_task(node.task, node.seed)
    with progress or Progress() as shown:
        shown.say(models.describe(loaded))
        sampler = open_sampler(policy, chat, rows=node.sampling.rows)
        label = "base" if base else "adapter"
        rows, episodes = evaluate(task.held_out[: node.eval.problems], task, chat, sampler, node.sampling, node.eval, node.seed)
        row = {"label": label, "stage": len(node.stages), "step": 0} | _eval_settings(node.eval)
        row |= {"changed": [text for text in overrides if not text.startswith("eval.")], "problems": rows}
        summary = summarise(row)
        shown.evaluation(label, summary)
        add_later_eval(folder, row)
    return Evaluation(summary, [{"label": label, **e.to_json(), "texts": _texts(chat, e)} for e in episodes])


def _eval_settings(node: recipe.Eval) -> dict[str, Any]:
    return {"tries": node.tries, "samples": node.samples, "temperature": node.temperature}


def _session(node: recipe.Recipe, run: Run, accelerator: Accelerator, progress: Progress) -> Session:
    task = open_task(node.task, node.seed)
    with accelerator.main_process_first():  # the others find the model in the cache
        loaded = models.load_model(node.model, node.seed, accelerator.device)
    chat = Chat(loaded.tokenizer, eos=_eos(loaded.model))
    policy = Policy(loaded.model, loaded.device, loaded.dtype)
    for line in (models.describe(loaded), *task.notes):
        progress.say(line)
    if (weights := run.weights()) is not None:
        policy.load(weights)
        progress.say(f"resuming at stage {run.position.stage}, step {run.position.step}")
    if node.track:
        accelerator.init_trackers("minirl", config={"recipe": node.dump()})
    sampler = open_sampler(policy, chat, rows=node.sampling.rows)
    return Session(node, run, accelerator, policy, chat, task, sampler, progress)


def _eos(model: Any) -> list[int]:
    """The ids that end a completion, by the model's own generation config: one, several or none."""
    ids = model.generation_config.eos_token_id
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def _run_stages(s: Session) -> None:
    if s.run.position == Position(0, 0) and s.recipe.eval.start and s.run.weights() is None:
        score = _evaluate(s, "start", stage=0, step=0)
        s.run.checkpoint(Position(0, 0), s.policy.save, score=score)
        if s.asked_to_stop():
            raise Interrupted
    for index in range(s.run.position.stage, len(s.recipe.stages)):
        stage = s.recipe.stages[index]
        if isinstance(stage, recipe.Collect):
            _collect(s, index, stage)
        else:
            _train(s, index, stage)


def _collect(s: Session, index: int, stage: recipe.Collect) -> None:
    """Play problems chunk by chunk and keep what the stage wants; every chunk is saved."""
    chunks = _length(stage)
    s.progress.stage(f"{index} collect {stage.keep}", chunks, s.run.position.step)
    problems = draw(s.task.train, stage.problems, 0, s.recipe.seed)
    for chunk in range(s.run.position.step, chunks):
        began, before = time.monotonic(), s.sampler.tokens
        mine = s.mine(problems[chunk * stage.batch : (chunk + 1) * stage.batch])
        talks = [s.talk(p, f"{index}/{chunk}/{p.id}/{k}", temperature=stage.temperature) for p in mine for k in range(stage.samples)]
        episodes = s.play([single(talk, s.task) for talk in talks])
        groups = s.gather([group.episodes for group in regroup(episodes, stage.samples)])
        kept = [episode for group in groups for episode in _keep(group, stage)]
        s.run.keep(index, kept)
        row = {"stage": index, "step": chunk, "kept": len(kept)} | _means([e for group in groups for e in group])
        _log(s, row, {"sample_s": time.monotonic() - began, "sample_tps": (s.sampler.tokens - before) / (time.monotonic() - began)})
        done = chunk + 1 == chunks
        s.run.advance(Position(index + 1, 0) if done else Position(index, chunk + 1))
        if s.asked_to_stop():
            raise Interrupted
    s.accelerator.wait_for_everyone()  # the next stage reads what the main process has just written


def _length(stage: recipe.Stage) -> int:
    """How many steps (or collect chunks) a stage has."""
    return -(-stage.problems // stage.batch) if isinstance(stage, recipe.Collect) else stage.steps


def _keep(episodes: Sequence[Episode], stage: recipe.Collect) -> list[Episode]:
    """The stage's choice among one problem's episodes, no two with the same tokens."""
    wanted = {"failed": (False,), "passed": (True,), "all": (False, True)}[stage.keep]
    distinct = {e.tokens: e for e in episodes if e.parts["first"] in wanted}
    return list(distinct.values())[: stage.keep_each]


def _train(s: Session, index: int, stage: recipe.Train) -> None:
    """A stage's steps, with its evaluations and checkpoints."""
    learner = _learner(s, index, stage)
    problems = _problems(s, index, stage)
    method = method_of(stage)
    label = f"{index}-{stage.method}"
    s.progress.stage(f"{index} train {stage.method} ({stage.learner.loss})", stage.steps, s.run.position.step)
    for step in range(s.run.position.step, stage.steps):
        torch.manual_seed(seed_of(s.recipe.seed, index, step))
        began, before = time.monotonic(), s.sampler.tokens
        drawn, tried = _draw(s, index, step, stage, problems)
        talks = [s.talk(p, f"{index}/{step}/{n}/{p.id}/{g}") for n, p in drawn for g in range(stage.group)]
        groups = regroup(s.play([method(talk, s.task) for talk in talks]), stage.group)
        sampled = time.monotonic()
        stats = learner.update(groups)
        learned = time.monotonic()
        row = {"stage": index, "step": step} | _group_means(s, groups) | tried | stats
        times = {"sample_s": sampled - began, "learn_s": learned - sampled}
        times |= {"sample_tps": (s.sampler.tokens - before) / times["sample_s"], "learn_tps": stats["trained_tokens"] / times["learn_s"]}
        _log(s, row, times, [e for group in groups for e in group.episodes][: s.recipe.save.episodes])
        last = step + 1 == stage.steps
        score = None
        if last or (s.recipe.eval.every and (step + 1) % s.recipe.eval.every == 0):
            score = _evaluate(s, label if last else f"{label}@{step + 1}", stage=index, step=step + 1)
        stop = s.asked_to_stop()
        if last:
            s.run.checkpoint(Position(index + 1, 0), s.policy.save, score=score)
        elif stop or score is not None or (step + 1) % s.recipe.save.every == 0:
            s.run.checkpoint(Position(index, step + 1), lambda folder: _save(s.policy, learner, folder), score=score)
        if stop:
            raise Interrupted


def _learner(s: Session, index: int, stage: recipe.Train) -> Learner:
    """The stage's learner, with the optimizer's state and the KL reference as a resumed run left them."""
    sampling = s.recipe.sampling
    limit = sampling.reflection_tokens + sampling.attempt_tokens * stage.train_all if stage.method == "reflect" else sampling.attempt_tokens
    learner = Learner(
        s.policy,
        stage.learner,
        s.accelerator,
        steps=stage.steps,
        limit_tokens=limit,
        temperature=sampling.temperature,
        pad=s.chat.tokenizer.pad_token_id,
    )
    reference, weights = s.run.reference(index), s.run.weights()
    if s.run.position.step == 0:
        if s.accelerator.is_main_process:
            write_folder(reference, s.policy.save)
        s.policy.freeze_reference()
    else:
        assert weights is not None  # a step above 0 is only ever recorded together with weights
        s.policy.load(reference)
        s.policy.freeze_reference()
        s.policy.load(weights)
        learner.load_state(load_file(weights / LEARNER_TENSORS), json.loads((weights / LEARNER_STATE).read_text()))
    return learner


def _save(policy: Policy, learner: Learner, folder: Path) -> None:
    policy.save(folder)
    tensors, plain = learner.state()
    save_file(tensors, folder / LEARNER_TENSORS)
    (folder / LEARNER_STATE).write_text(json.dumps(plain))


def _problems(s: Session, index: int, stage: recipe.Train) -> Sequence[Problem]:
    """What the stage trains on: the task's problems, or what the collect stage before it kept."""
    if index == 0 or not isinstance(s.recipe.stages[index - 1], recipe.Collect):
        return s.task.train
    kept = s.run.kept(index - 1)
    if not kept:
        raise UserError(f"stages[{index}]: the collect stage before it kept nothing; collect more problems or samples, or change `keep`")
    if stage.method == "reflect":
        if any(e.parts["first"] for e in kept):
            raise UserError(f"stages[{index}]: method reflect needs failed attempts; set keep: failed in stages[{index - 1}]")
        return [failed(e.problem, e.turns) for e in kept]
    return [e.problem for e in kept]


def _draw(
    s: Session, index: int, step: int, stage: recipe.Train, problems: Sequence[Problem]
) -> tuple[list[tuple[int, Problem]], dict[str, float]]:
    """This process's problems of a step, numbered; for on-line R3 these are failed attempts, made here."""
    if stage.method != "reflect" or problems[0].context:
        return list(s.mine(list(enumerate(draw(problems, stage.batch, step * stage.batch, s.recipe.seed))))), {}
    window = stage.batch * stage.attempts
    drawn = draw(problems, window, step * window, s.recipe.seed)
    share, found, tried = len(s.mine(range(stage.batch))), [], 0
    for round_ in range(stage.attempts):
        mine = s.mine(drawn[round_ * stage.batch : (round_ + 1) * stage.batch])[:share]
        episodes = s.play([single(s.talk(p, f"{index}/{step}/attempt/{round_}/{p.id}"), s.task) for p in mine])
        found += [failed(e.problem, e.turns) for e in episodes if not e.parts["first"]]
        tried += len(episodes)
        if len(found) >= share:
            break
    counts = s.gather([(len(found), tried)])
    failures, total = sum(f for f, _ in counts), sum(t for _, t in counts)
    return list(enumerate(found[:share])), {"first": 1.0 - failures / total, "tried": float(total)}


def _group_means(s: Session, groups: Sequence[Group]) -> dict[str, float]:
    """Means over a step's episodes, and how many groups there were; demonstrations have neither reward nor groups."""
    gathered = s.gather([[(e.reward, e.parts, e.finish, e.trained_tokens, e.sampled_tokens) for e in g.episodes] for g in groups])
    means = _mean_rows([row for group in gathered for row in group])
    if "reward" not in means:
        return means
    return {"groups": float(len(gathered))} | means


def _means(episodes: Sequence[Episode]) -> dict[str, float]:
    return _mean_rows([(e.reward, e.parts, e.finish, e.trained_tokens, e.sampled_tokens) for e in episodes])


def _mean_rows(rows: Sequence[tuple[float | None, dict[str, Any], str, int, int]]) -> dict[str, float]:
    """Means over episodes of the numbers that matter; a number that no episode has is left out."""
    columns: dict[str, list[float]] = {"reward": [float(r[0]) for r in rows if r[0] is not None]}
    for name in ("first", "second"):
        columns[name] = [float(r[1][name]) for r in rows if name in r[1]]
    columns["overlong"] = [float(r[2] == "length") for r in rows]
    columns["length"] = [float(r[3]) for r in rows]
    means = {name: sum(values) / len(values) for name, values in columns.items() if values}
    return means | {"sampled": float(sum(r[4] for r in rows))}


def _evaluate(s: Session, label: str, *, stage: int, step: int) -> float:
    """Evaluate on the held-out problems and log it; the score that picks the best checkpoint."""
    node, began = s.recipe.eval, time.monotonic()
    problems = s.task.held_out[: node.problems]
    s.progress.say(f"evaluating ({label}): {len(problems)} held-out problems x {node.samples}, {node.tries} tries")
    s.sampler.reset()
    rows, episodes = evaluate(s.mine(problems), s.task, s.chat, s.sampler, s.recipe.sampling, node, s.recipe.seed)
    rows = s.gather(rows)
    row = {"label": label, "stage": stage, "step": step} | _eval_settings(node) | {"problems": rows}
    s.run.log_eval(row)
    summary = summarise(row)
    s.run.log_time({"stage": stage, "step": step, "label": label, "eval_s": time.monotonic() - began})
    _log_episodes(s, episodes[: s.recipe.save.episodes], stage=stage, step=step, label=label)
    s.progress.evaluation(label, summary)
    _track(s, {f"eval/{key}": summary[key].value for key in ("first", "second", "fixed") if summary[key] is not None}, stage, step)
    return float(summary["second" if node.tries == 2 else "first"].value)


def _log(s: Session, row: dict[str, Any], times: dict[str, float], episodes: Sequence[Episode] = ()) -> None:
    s.run.log(row)
    s.run.log_time({"stage": row["stage"], "step": row["step"]} | times)
    _log_episodes(s, episodes, stage=row["stage"], step=row["step"], label="train")
    s.progress.step(row, times)
    _track(s, {f"{row['stage']}/{name}": value for name, value in (row | times).items()}, row["stage"], row["step"])


def _track(s: Session, values: dict[str, float], stage: int, step: int) -> None:
    """Send numbers to the trackers, at the step counted over all stages: some of them refuse one that goes back."""
    if s.recipe.track:
        s.accelerator.log(values, step=step + sum(_length(earlier) for earlier in s.recipe.stages[:stage]))


def _log_episodes(s: Session, episodes: Sequence[Episode], **labels: Any) -> None:
    s.run.log_episodes(episodes, [_texts(s.chat, e) for e in episodes], **labels)


def _texts(chat: Chat, episode: Episode) -> list[str]:
    return [chat.text(turn.tokens, special=True) for turn in episode.turns]


def _finish(s: Session) -> None:
    """The adapter for plain peft, the report, and the mark that all is done."""
    if s.accelerator.is_main_process:
        write_folder(s.run.folder / "adapter", lambda folder: models.save_adapter(s.policy.model, folder))
        s.progress.say(f"report: {write_report(s.run.folder)}")
    s.run.advance(Position(len(s.recipe.stages), 0), finished=True)


@contextmanager
def _interruptible(s: Session) -> Iterator[None]:
    """Inside, the first Ctrl-C lets the step in hand finish and be saved; the second stops at once."""

    def ask(signum: int, frame: object) -> None:
        if s.stop:
            raise KeyboardInterrupt
        s.stop = True
        text = "stopping after this step, which will be saved; Ctrl-C again to stop at once (loses the steps since the last save)"
        # A handler must not wait for the display, which the interrupted code may hold; a thread may.
        threading.Thread(target=s.progress.say, args=(text,)).start()

    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread alone
        return
    old = signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, old)
