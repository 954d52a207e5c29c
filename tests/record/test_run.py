"""The run folder: what a kill leaves behind resumes to identical files, and every misuse is one
line."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from minirl import recipe as recipes
from minirl.episode import Episode, Problem, Turn
from minirl.errors import UserError
from minirl.io import files
from minirl.record import evals, state
from minirl.record import run as rundir
from minirl.record.run import Run
from minirl.record.state import Position

STEPS, CHUNKS = 7, 3


@pytest.fixture(autouse=True)
def _skip_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fsync guards against is a power cut, which no test here stages; hundreds of them are
    most of this file's time."""
    monkeypatch.setattr("os.fsync", lambda handle: None)


def recipe(**changes: Any) -> recipes.Recipe:
    stages = [{"kind": "collect"}, {"kind": "train", "method": "reflect", "steps": STEPS}]
    data = {
        "model": {"name": "tiny"},
        "task": {"name": "countdown"},
        "stages": stages,
        "save": {"keep_last": 1},
    }
    return recipes.parse(data | changes, "test")


def episode(number: int) -> Episode:
    turns = (Turn("prompt", (1, 2)), Turn("attempt", (3, number), (-0.5, -1 / 3), True))
    return Episode(
        Problem(f"p{number}", "?", 7), turns, reward=0.1 * number, parts={"first": False}
    )


def play(folder: Path) -> None:
    """A whole run as train.py makes one: a collect stage of chunks, a train stage with checkpoints,
    resumed wherever it stands."""

    def write(step: int) -> Any:
        def fill(temp: Path) -> None:
            (temp / "adapter.bin").write_text(f"weights {step}")
            (temp / "optimizer").mkdir()
            (temp / "optimizer" / "state.bin").write_text(f"moments {step}")

        return fill

    with Run.open(folder, recipe()) as run:
        if run.finished:
            return
        if run.position == Position(0, 0) and run.weights() is None:
            run.log_eval({"label": "start"})
            run.checkpoint(Position(0, 0), write(0), score=0.05)
        while run.position.stage == 0:
            step = run.position.step
            run.keep(0, [episode(10 * step + i) for i in range(2)])
            run.log({"stage": 0, "step": step, "kept": 2})
            run.advance(Position(0, step + 1) if step + 1 < CHUNKS else Position(1, 0))
        if run.position.step == 0:
            files.write_folder(run.reference(1), write(-1))
        weights = run.weights()
        assert (
            weights is None
            or (weights / "adapter.bin").read_text() == f"weights {run.position.step}"
        )
        for step in range(run.position.step, STEPS):
            run.log({"stage": 1, "step": step, "reward": step / 3, "kl": float("nan")})
            run.log_time({"step": step, "sample_s": 0.5})
            run.log_episodes(
                [episode(step)], texts=[["prompt", f"text {step}"]], stage=1, step=step
            )
            if (step + 1) % 2 == 0 or step + 1 == STEPS:
                run.log_eval({"label": "1-reflect", "step": step + 1})
                run.checkpoint(
                    Position(1, step + 1), write(step + 1), score=[0.1, 0.7, 0.3, 0.2][step // 2]
                )
        files.write_folder(folder / "adapter", write(STEPS))
        run.advance(Position(2, 0), finished=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != ".lock"
    }


def test_finished_run_holds_what_was_written(tmp_path: Path) -> None:
    play(tmp_path / "run")
    with Run.open(tmp_path / "run", recipe()) as run:
        assert run.finished
        assert run.position == Position(2, 0)
        assert [row["step"] for row in run.rows("metrics")] == [0, 1, 2, *range(STEPS)]
        assert run.rows("metrics")[4] == {"stage": 1, "step": 1, "reward": 1 / 3, "kl": None}
        assert [row["step"] for row in run.rows("timings")] == list(range(STEPS))
        assert run.rows("episodes")[2]["texts"] == ["prompt", "text 2"]
        assert run.rows("evals")[0] == {"label": "start"}
        assert run.kept(0) == [episode(n) for n in (0, 1, 10, 11, 20, 21)]
        assert run.kept(5) == []
    # Of 2, 4, 6, 7: the newest, and 4 with the best score.
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == [
        "01-000004",
        "01-000007",
        "reference-1",
    ]
    assert recipes.load(tmp_path / "run/recipe.yaml") == recipe()


def snapshots(folder: Path, store: Path) -> Iterator[Path]:
    """Play a run; every state that its folder passes through on the disk, as a copy: what a kill -9
    at that moment would leave."""
    seen: dict[tuple[tuple[str, bytes | None], ...], Path] = {}
    watched = {rundir.__file__, files.__file__, state.__file__, shutil.__file__, __file__}

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in watched:
            return None
        sys.settrace(None)
        paths = sorted(folder.rglob("*"))
        state = tuple(
            (str(p), p.read_bytes() if p.is_file() else None) for p in paths if p.name != ".lock"
        )
        if state not in seen:
            seen[state] = store / str(len(seen))
            if folder.exists():
                shutil.copytree(folder, seen[state])
        sys.settrace(trace)
        return trace

    sys.settrace(trace)
    try:
        play(folder)
    finally:
        sys.settrace(None)
    yield from seen.values()


@pytest.mark.slow
def test_kill_at_any_moment_resumes_to_the_same_files(tmp_path: Path) -> None:
    count = 0
    for snapshot in snapshots(tmp_path / "whole", tmp_path / "snapshots"):
        play(snapshot)
        assert contents(snapshot) == contents(tmp_path / "whole"), snapshot
        count += 1
    assert count > 100  # one per write, rename and removal: rows, files of a checkpoint, prunes


@pytest.mark.slow
@pytest.mark.parametrize("cut", [1, 7, 40])
def test_torn_last_lines_are_cut(tmp_path: Path, cut: int) -> None:
    play(tmp_path / "whole")
    for number, snapshot in enumerate(snapshots(tmp_path / "run", tmp_path / "snapshots")):
        state = (
            json.loads((snapshot / "state.json").read_text())
            if (snapshot / "state.json").exists()
            else {"sizes": {}}
        )
        torn = [p for p in snapshot.rglob("*.jsonl") if p.name != "versions.jsonl"]
        torn = [
            p
            for p in torn
            if p.stat().st_size - cut >= state["sizes"].get(str(p.relative_to(snapshot)), 0)
        ]
        if number % 4 or not torn:
            continue
        for path in torn:
            path.write_bytes(path.read_bytes()[:-cut])
        play(snapshot)
        assert contents(snapshot) == contents(tmp_path / "whole"), snapshot


def test_lock_refuses_a_second_process_and_dies_with_the_first(tmp_path: Path) -> None:
    code = (
        "import sys, time; sys.path[:0] = sys.argv[2:]; from test_run import *; run ="
        " Run.open(sys.argv[1], recipe()); run.log({'step': 0}); print('open', flush=True);"
        " time.sleep(60)"
    )
    folder = tmp_path / "run"
    paths = [str(Path(__file__).parent), str(Path(rundir.__file__).parents[2])]
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder), *paths], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        with pytest.raises(UserError, match="another process is running in it"):
            Run.open(folder, recipe())
        assert files.read_rows(folder / "metrics.jsonl") == [
            {"step": 0}
        ]  # a reader sees rows at once
        process.send_signal(signal.SIGKILL)
        process.wait()
        with Run.open(folder, recipe()) as run:
            assert run.rows("metrics") == []  # nothing was saved, so it starts over
    finally:
        process.kill()
        process.wait()


def test_other_processes_only_look(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", recipe()) as run:
        run.keep(0, [episode(1)])
        run.advance(Position(1, 0))
        before = contents(tmp_path / "run")
        other = Run.open(tmp_path / "run", recipe(), main=False)
        assert other.position == Position(1, 0)
        assert other.kept(0) == [episode(1)]
        other.log({"step": 1})
        other.keep(0, [episode(2)])
        other.checkpoint(Position(1, 2), lambda temp: pytest.fail("only the main process writes"))
        assert other.position == Position(1, 2)
        other.advance(Position(2, 0), finished=True)
        assert other.finished
        assert contents(tmp_path / "run") == before


def test_saving_twice_at_one_position_never_touches_the_named_folder(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", recipe(save={"keep_last": 2})) as run:
        for text in ("one", "two", "three"):
            run.checkpoint(
                Position(1, 2), lambda temp, text=text: (temp / "w").write_text(text) and None
            )  # type: ignore[misc]
        weights = run.weights()
        assert weights is not None
        assert (weights / "w").read_text() == "three"
        assert len(list((tmp_path / "run/checkpoints").iterdir())) == 2


def test_changed_recipe_is_refused_with_the_keys_that_differ(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", recipe()) as run:
        run.advance(Position(0, 1))
    changed = recipe(seed=5, sampling={"temperature": 0.9})
    with pytest.raises(
        UserError,
        match=(
            r"seed: 0 -> 5, sampling\.temperature: 1\.0 -> 0\.9; name another folder with --out or"
            r" delete"
        ),
    ):
        Run.open(tmp_path / "run", changed)
    stages = [{"kind": "collect"}, {"kind": "train", "method": "reflect", "steps": 9}]
    with pytest.raises(UserError, match=r"stages\.1\.steps: 7 -> 9"):
        Run.open(tmp_path / "run", recipe(stages=stages))


def test_recipe_may_change_while_nothing_is_saved(tmp_path: Path) -> None:
    """A first attempt that fails on its model or its data does not lock the folder to the faulty
    recipe."""
    with Run.open(tmp_path / "run", recipe()) as run:
        run.log({"step": 0})
    with Run.open(tmp_path / "run", recipe(seed=5)) as run:
        assert run.rows("metrics") == []
        run.advance(Position(0, 1))
    assert recipes.load(tmp_path / "run/recipe.yaml") == recipe(seed=5)
    with pytest.raises(UserError, match="seed: 5 -> 0"):
        Run.open(tmp_path / "run", recipe())


def test_lost_state_is_refused_and_nothing_dropped(tmp_path: Path) -> None:
    play(tmp_path / "run")
    (tmp_path / "run/state.json").unlink()
    before = contents(tmp_path / "run")
    with pytest.raises(
        UserError,
        match=r"state\.json: missing, yet metrics\.jsonl is there; restore the file, or delete",
    ):
        Run.open(tmp_path / "run", recipe())
    assert contents(tmp_path / "run") == before


def test_later_evaluations_replace_their_own_kind_only(tmp_path: Path) -> None:
    Run.open(tmp_path / "run", recipe()).close()
    row = {
        "label": "adapter",
        "tries": 2,
        "samples": 1,
        "temperature": 0.0,
        "changed": [],
        "problems": [1],
    }
    for change in (
        {},
        {"label": "base"},
        {"samples": 8},
        {"changed": ["sampling.rows=4"]},
        {"problems": [2]},
    ):
        evals.add_later_eval(tmp_path / "run", row | change)
    kept = files.read_rows(tmp_path / "run" / evals.LATER)
    assert [(r["label"], r["samples"], r["changed"], r["problems"]) for r in kept] == [
        ("base", 1, [], [1]),
        ("adapter", 8, [], [1]),
        ("adapter", 1, ["sampling.rows=4"], [1]),
        ("adapter", 1, [], [2]),
    ]
    play(tmp_path / "run")  # a run that goes on leaves them alone
    assert len(files.read_rows(tmp_path / "run" / evals.LATER)) == 4


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("!")
    with pytest.raises(UserError, match=r"'chapter.txt' but no recipe.yaml"):
        Run.open(tmp_path / "thesis", recipe())
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == [
        "chapter.txt"
    ]  # not even a lock is left there
    with pytest.raises(UserError, match="cannot be used as a run folder"):
        Run.open(tmp_path / "thesis" / "chapter.txt" / "run", recipe())
    with pytest.raises(UserError, match="is a file"):
        Run.open(tmp_path / "thesis" / "chapter.txt", recipe())


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"position": 3}', '{"position":{"stage":0,"step":"x"}}']
)
def test_corrupt_state_is_refused(tmp_path: Path, text: str) -> None:
    play(tmp_path / "run")
    (tmp_path / "run/state.json").write_text(text)
    with pytest.raises(UserError, match=r"state\.json: not a run's state"):
        Run.open(tmp_path / "run", recipe())


def test_missing_files_that_the_state_counts_on(tmp_path: Path) -> None:
    play(tmp_path / "run")
    (tmp_path / "run/metrics.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl: has 3 bytes, state\.json counts on \d+"):
        Run.open(tmp_path / "run", recipe())
    play(tmp_path / "other")
    shutil.rmtree(tmp_path / "other/checkpoints/01-000007")
    with pytest.raises(UserError, match="01-000007: missing"):
        Run.open(tmp_path / "other", recipe())


def test_malformed_rows_name_file_and_line(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", recipe()) as run:
        run.keep(0, [episode(1), episode(2)])
        path = tmp_path / "run/kept/0.jsonl"
        good = path.read_text().splitlines()
        for bad, match in (
            ("{", "not a JSON row"),
            ("3", "expected a JSON object"),
            ('{"turns": []}', "not an episode"),
        ):
            path.write_text(good[0] + "\n" + bad + "\n")
            with pytest.raises(UserError, match=rf"0\.jsonl:2: .*{match}"):
                run.kept(0)
        path.write_text(good[0] + "\n" + good[1][:-9])
        with pytest.raises(UserError, match=r"0\.jsonl:2: not a JSON row"):
            run.kept(0)
        (tmp_path / "run/metrics.jsonl").write_text('{"step":0}\n{"step":')
        assert run.rows("metrics") == [{"step": 0}]
        (tmp_path / "run/metrics.jsonl").write_text('{"step":0}\n\n{"step":2}\n')
        with pytest.raises(UserError, match=r"metrics\.jsonl:2"):
            run.rows("metrics")


def test_rows_are_compact_exact_and_free_of_nan() -> None:
    row = {"a": 0.1, "b": [float("inf"), 1 / 3], "c": {"d": float("nan")}, "text": "é\ud800\u2028"}
    assert (
        files.compact(row)
        == b'{"a":0.1,"b":[null,0.3333333333333333],"c":{"d":null},"text":"\\u00e9\\ud800\\u2028"}'
    )
    assert json.loads(files.compact({"x": 5e-324}))["x"] == 5e-324
