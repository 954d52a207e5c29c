"""The one loop: stages of steps that play, learn, log and save.

Invariant: what a step does is a function of the recipe, the weights and the step's number, so a run that was killed and taken up again
writes the same bytes as one that was not.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from safetensors.torch import load_file, save_file

from minirl import recipe
from minirl.adapter import adapter_state, save_adapter
from minirl.episode import Episode, Group, Problem, regroup
from minirl.errors import UserError
from minirl.files import write_folder
from minirl.learner import Learner
from minirl.methods import Method, method_of
from minirl.methods.demonstrate import as_sampled, demonstrate
from minirl.methods.reflect import failed
from minirl.methods.single import single
from minirl.metrics import Facts, means
from minirl.policy import Policy
from minirl.progress import Progress
from minirl.report import write_report
from minirl.reward import RewardModel, Sample
from minirl.rollout import seed_of
from minirl.rundir import Run
from minirl.session import Interrupted, Session, interruptible, length, open_session
from minirl.state import Position
from minirl.tasks import draw
from minirl.trajectories import StepScorer, described, filter_stage, relayed, rewarded, states_of, with_provenance

LEARNER_TENSORS, LEARNER_STATE = "learner.safetensors", "learner.json"


def train(node: recipe.Recipe, folder: Path, progress: Progress | None = None) -> Path:
    """Run a recipe in a folder to its end, from wherever that folder stands; the folder of the final adapter.

    Raises UserError for what the user can mend, Interrupted after a Ctrl-C once the step in hand is saved.
    """
    if missing := sorted(set(node.track) - {str(name) for name in get_available_trackers()}):  # accelerate would leave it out silently
        raise UserError(f"track: got {missing[0]!r}, which is not installed; `pip install {missing[0]}` or take it out of the list")
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), log_with=list(node.track) or None, project_dir=str(folder))
    alone = [index for index, stage in enumerate(node.stages) if isinstance(stage, recipe.RewardModel)]
    if alone and accelerator.num_processes > 1:
        raise UserError(f"stages[{alone[0]}]: a reward model is trained by one process; run the recipe without `accelerate launch`")
    if accelerator.is_main_process:
        run = Run.open(folder, node)
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        run = Run.open(folder, node, main=False)
    with run, progress or Progress(quiet=not accelerator.is_main_process) as shown:
        if run.finished:
            shown.say(f"{folder}: finished already; use another --out to run again")
            return folder / "adapter"
        session = open_session(node, run, accelerator, shown)
        try:
            with interruptible(session):
                _run_stages(session)
            _finish(session)
        finally:
            accelerator.end_training()  # trackers write out what they still hold
    return folder / "adapter"


def _run_stages(s: Session) -> None:
    if s.run.position == Position(0, 0) and s.recipe.eval.start and s.run.weights() is None:
        score = s.evaluate("start", stage=0, step=0)
        s.run.checkpoint(Position(0, 0), s.policy.save, score=score)
        if s.asked_to_stop():
            raise Interrupted
    for index in range(s.run.position.stage, len(s.recipe.stages)):
        stage = s.recipe.stages[index]
        if isinstance(stage, recipe.Collect):
            _collect(s, index, stage)
        elif isinstance(stage, recipe.Filter):
            filter_stage(s, index, stage)
        elif isinstance(stage, recipe.RewardModel):
            _reward_model(s, index, stage)
        elif not stage.steps:
            s.run.advance(Position(index + 1, 0))
        else:
            _train(s, index, stage)


def _collect(s: Session, index: int, stage: recipe.Collect) -> None:
    """Play problems chunk by chunk and keep what the stage wants; every chunk is saved."""
    chunks = length(stage)
    s.progress.stage(f"{index} collect {stage.keep}", chunks, s.run.position.step)
    problems = draw(_problems(s, index, stage), stage.problems, 0, s.recipe.seed)
    began_at = s.run.position.step
    for chunk in range(began_at, chunks):
        began, before = time.monotonic(), s.sampler.tokens
        mine = s.mine(list(enumerate(problems[chunk * stage.batch : (chunk + 1) * stage.batch])))
        if stage.speaker is not None:
            own = relayed(s, stage, f"{index}/{chunk}", mine)
        else:
            method, check = method_of(stage), chunk == began_at
            own = _play(s, f"{index}/{chunk}", method, mine, stage.samples, check=check, temperature=stage.temperature)
        if stage.method == "stepwise":
            own = with_provenance(s, stage, f"{index}/{chunk}", own, mine)
        groups = s.gather([group.episodes for group in own])
        kept = [episode for group in groups for episode in _keep(group, stage)]
        s.run.keep(index, kept)
        row = {"stage": index, "step": chunk, "kept": len(kept)} | means([Facts.of(e) for group in groups for e in group])
        s.log(row, {"sample_s": time.monotonic() - began, "sample_tps": (s.sampler.tokens - before) / (time.monotonic() - began)})
        done = chunk + 1 == chunks
        s.run.advance(Position(index + 1, 0) if done else Position(index, chunk + 1))
        if s.asked_to_stop():
            raise Interrupted
    s.accelerator.wait_for_everyone()  # the next stage reads what the main process has just written
    if stage.method == "stepwise":
        s.progress.say(f"collected {described(s.run.kept(index))}")


def _keep(episodes: Sequence[Episode], stage: recipe.Collect) -> list[Episode]:
    """The stage's choice among one problem's episodes, no two with the same tokens; with `passed` none that its token limit cut."""
    wanted = {"failed": (False,), "passed": (True,), "all": (False, True)}[stage.keep]
    whole = [e for e in episodes if stage.keep != "passed" or e.finish != "length"]
    distinct = {e.tokens: e for e in whole if e.parts["first"] in wanted}
    return list(distinct.values())[: stage.keep_each]


def _train(s: Session, index: int, stage: recipe.Train) -> None:
    """A stage's steps, with its evaluations and checkpoints."""
    if index and isinstance(s.recipe.stages[index - 1], recipe.Filter) and not s.run.kept(index - 1):
        s.progress.say(f"WARNING: stages[{index}]: the filter before it kept nothing; nothing is trained")
        s.run.advance(Position(index + 1, 0))
        return
    learner = _learner(s, index, stage)
    problems = _problems(s, index, stage)
    method, judge = method_of(stage), None if stage.judge is None else StepScorer(s, stage.judge, stage.method)
    label = f"{index}-{stage.method}"
    s.progress.stage(f"{index} train {stage.method} ({stage.learner.loss})", stage.steps, s.run.position.step)
    began_at = s.run.position.step
    for step in range(began_at, stage.steps):
        torch.manual_seed(seed_of(s.recipe.seed, index, step))
        began, before = time.monotonic(), s.sampler.tokens
        drawn, tried = _draw(s, index, step, stage, problems)
        groups = _play(s, f"{index}/{step}", method, drawn, stage.group, check=step == began_at, temperature=s.recipe.sampling.temperature)
        if stage.method == "self_train":
            groups += _play(s, f"{index}/{step}/shown", partial(demonstrate, share=0.0), drawn, 1, check=False, temperature=1.0)
        if judge is not None:
            groups, opinions = rewarded(s, stage, groups, judge)
            tried |= opinions
        sampled = time.monotonic()
        stats = learner.update(groups)
        learned = time.monotonic()
        facts = s.gather([[Facts.of(e) for e in group.episodes] for group in groups])
        row = {"stage": index, "step": step} | means([f for group in facts for f in group]) | tried | stats
        times = {"sample_s": sampled - began, "learn_s": learned - sampled}
        times |= {"sample_tps": (s.sampler.tokens - before) / times["sample_s"], "learn_tps": stats["trained_tokens"] / times["learn_s"]}
        s.log(row, times, [e for group in groups for e in group.episodes][: s.recipe.save.episodes])
        last = step + 1 == stage.steps
        score = None
        if last or (s.recipe.eval.every and (step + 1) % s.recipe.eval.every == 0):
            score = s.evaluate(label if last else f"{label}@{step + 1}", stage=index, step=step + 1)
        stop = s.asked_to_stop()
        if last:
            s.run.checkpoint(Position(index + 1, 0), s.policy.save, score=score)
        elif stop or score is not None or (step + 1) % s.recipe.save.every == 0:
            s.run.checkpoint(Position(index, step + 1), lambda folder: _save(s.policy, learner, folder), score=score)
        if stop:
            raise Interrupted


def _reward_model(s: Session, index: int, stage: recipe.RewardModel) -> None:
    """Train a reward model on what the collect stage before has kept, to the run's folder reward_model; all of it or nothing is done."""
    s.progress.stage(f"{index} reward model", stage.epochs)
    problems = sorted({e.problem.id for e in s.run.kept(index - 1)}, key=lambda name: seed_of(s.recipe.seed, index, name))
    held_out = set(problems[: round(stage.held_out * len(problems))])
    parts: tuple[list[Sample], list[Sample]] = ([], [])
    for episode in s.run.kept(index - 1):
        parts[episode.problem.id in held_out].append(Sample(episode.tokens, bool(episode.parts["first"])))
    model = RewardModel.fresh(s.recipe.model, adapter_state(s.policy.model), s.recipe.seed, s.policy.device)
    began = time.monotonic()

    def log(row: dict[str, float]) -> None:
        s.log({"stage": index, **row}, {"learn_s": time.monotonic() - began})

    facts = model.fit(parts[0], parts[1], stage, s.recipe.seed, log, s.asked_to_stop)
    if facts is not None:
        write_folder(s.run.folder / "reward_model", lambda folder: model.save(folder, facts))
        s.run.advance(Position(index + 1, 0))
    if s.asked_to_stop():
        raise Interrupted


def _play(
    s: Session, seed: str, method: Method, drawn: Sequence[tuple[int, Problem]], size: int, *, check: bool, temperature: float
) -> list[Group]:
    """A group of `size` episodes for each drawn problem; with `check`, once again where their sampler turns out to be wrong."""

    def played() -> list[Group]:
        talks = [s.talk(p, f"{seed}/{n}/{p.id}/{k}", temperature=temperature) for n, p in drawn for k in range(size)]
        return regroup(s.play([method(talk, s.task) for talk in talks]), size)

    groups = played()
    return played() if check and s.check(groups, temperature=temperature) else groups


def _learner(s: Session, index: int, stage: recipe.Train) -> Learner:
    """The stage's learner, with the optimizer's state and the KL reference as a resumed run left them."""
    sampling = s.recipe.sampling
    limit = sampling.reflection_tokens + sampling.attempt_tokens * stage.train_all if stage.method == "reflect" else sampling.attempt_tokens
    limit *= sampling.stepwise.steps if stage.method == "stepwise" else 1
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


def _export(policy: Policy, folder: Path) -> None:
    save_adapter(policy.model, folder)
    if policy.value_head is not None:
        policy.value_head.save(folder)


def _problems(s: Session, index: int, stage: recipe.Collect | recipe.Train) -> Sequence[Problem]:
    """What the stage plays: the task's problems, or what the collect stage before it kept."""
    if index == 0 or isinstance(stage, recipe.Collect) or not isinstance(s.recipe.stages[index - 1], recipe.Collect | recipe.Filter):
        if not s.task.train:
            raise UserError(f"stages[{index}]: task {s.task.name!r} has no training problems; set task.train above 0, or only evaluate")
        return s.task.train
    episodes = s.run.kept(index - 1)
    if not episodes:
        raise UserError(f"stages[{index}]: the collect stage before it kept nothing; collect more problems or samples, or change `keep`")
    if stage.method in ("step", "imitate"):
        return states_of(s, index, stage, episodes)
    if stage.method == "reflect":
        if any(e.parts["first"] for e in episodes):
            raise UserError(f"stages[{index}]: method reflect needs failed attempts; set keep: failed in stages[{index - 1}]")
        return [failed(e.problem, e.turns) for e in episodes]
    if stage.examples != "demonstrations":
        return [*(s.task.train if stage.examples == "both" else ()), *map(as_sampled, episodes)]
    return [e.problem for e in episodes]


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
        mine = s.mine(list(enumerate(drawn))[round_ * stage.batch : (round_ + 1) * stage.batch])[:share]
        episodes = s.play([single(s.talk(p, f"{index}/{step}/attempt/{n}/{p.id}"), s.task) for n, p in mine])
        found += [failed(e.problem, e.turns) for e in episodes if not e.parts["first"]]
        tried += len(episodes)
        if len(found) >= share:
            break
    counts = s.gather([(len(found), tried)])
    failures, total = sum(f for f, _ in counts), sum(t for _, t in counts)
    return list(enumerate(found[:share])), {"first": 1.0 - failures / total, "tried": float(total)}


def _finish(s: Session) -> None:
    """The adapter for plain peft (with the value head beside it, where there is one), the report, and the mark that all is done."""
    if s.accelerator.is_main_process:
        write_folder(s.run.folder / "adapter", lambda folder: _export(s.policy, folder))
        s.progress.say(f"report: {write_report(s.run.folder)}")
    s.run.advance(Position(len(s.recipe.stages), 0), finished=True)
