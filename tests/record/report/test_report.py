"""The report: right numbers in it, nothing hostile out of it, and a page for a run that has barely
begun."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from math import exp
from pathlib import Path
from random import Random
from typing import Any

import pytest

from minirl import recipe as recipes
from minirl.episode import Episode, Problem, Turn
from minirl.errors import UserError
from minirl.record.evals import add_later_eval, compare, summarise
from minirl.record.measures import MEASURES
from minirl.record.report import curves_html, episode_html, write_report
from minirl.record.report.chart import ticks as _ticks
from minirl.record.run import Run
from minirl.record.state import Position

HOSTILE = (
    "</div><script>alert('x')</script><img src=x onerror=alert(1)> ${title} & \x00\x1b[31m \ud800"
    " \u202e done"
)
RECIPE = recipes.parse(
    {
        "model": {"name": "org/<b>model</b>"},
        "task": {"name": "countdown"},
        "stages": [{"kind": "collect"}, {"kind": "train", "method": "reflect", "steps": 60}],
    },
    "test",
)


class Page(HTMLParser):
    """Every element of a page with its attributes, the text, and whether the elements close in
    order."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def count(self, tag: str, style: str) -> int:
        return sum(
            name == tag and style in (attributes.get("class") or "").split()
            for name, attributes in self.elements
        )


def evaluation(
    label: str,
    stage: int,
    step: int,
    first: float,
    fixed: float,
    samples: int = 4,
    problems: int = 60,
) -> dict[str, Any]:
    rng, rows = Random(f"{label}"), []
    for number in range(problems):
        passed = [int(rng.random() < first) for _ in range(samples)]
        within = [int(bool(p or rng.random() < fixed)) for p in passed]
        kinds = ["missed_target", "wrong_numbers", "invalid_equation"]
        errors = [[None if x else rng.choice(kinds) for x in tries] for tries in (passed, within)]
        rows.append(
            {
                "id": f"p{number}",
                "first": passed,
                "second": within,
                "first_error": errors[0],
                "second_error": errors[1],
            }
        )
    return {
        "label": label,
        "stage": stage,
        "step": step,
        "tries": 2,
        "samples": samples,
        "temperature": 0.7,
        "problems": rows,
    }


def episode(number: int, text: str) -> tuple[Episode, list[str]]:
    turns = (
        Turn("prompt", (1, 2, 3)),
        Turn("attempt", (4, 5), (-0.1, -0.2)),
        Turn("request", (6,)),
        Turn("reflection", (7, 8, 9), (-0.1, -0.2, -0.3), True),
        Turn("retry", (10,), (-0.5,)),
    )
    parts = {"first": False, "second": number % 2 == 0, "first_error": "missed_target"}
    texts = ["Reach 24 with 3, 8, 1.", "3 + 8 + 1 = 12", "What went wrong?", text, "(3 * 8) * 1"]
    return (
        Episode(
            Problem(f"problem {number}", "?", 24), turns, reward=float(number % 2 == 0), parts=parts
        ),
        texts,
    )


def make_run(folder: Path, steps: int = 60, chunks: int = 6) -> None:
    """A synthetic run: numbers that look like a run's, no model."""
    rng = Random(1)
    with Run.open(folder, RECIPE) as run:
        run.log_eval(evaluation("start", 0, 0, 0.2, 0.12))
        pairs = [episode(n, "I added; multiply instead.") for n in range(4)]
        run.log_episodes(
            [e for e, _ in pairs], [t for _, t in pairs], label="start", stage=0, step=0
        )
        for step in range(chunks):
            run.log(
                {
                    "stage": 0,
                    "step": step,
                    "kept": 40,
                    "reward": 0.2,
                    "first": 0.2 + rng.gauss(0, 0.02),
                    "sampled": 9000.0,
                }
            )
            run.log_time(
                {"stage": 0, "step": step, "sample_s": 20.0, "sample_tps": 450 + rng.gauss(0, 9)}
            )
        for step in range(steps):
            gain = 1 - exp(-step / 25)
            reward = 0.15 + 0.35 * gain + rng.gauss(0, 0.05)
            row = {
                "stage": 1,
                "step": step,
                "groups": 16.0,
                "dead": float(rng.randrange(3, 9)),
                "reward": reward,
                "second": reward,
            }
            row |= {
                "length": 60 - 25 * gain + rng.gauss(0, 3),
                "loss": rng.gauss(0, 0.01),
                "kl": 0.02 * gain,
                "entropy": 1.4 - 0.5 * gain,
            }
            row |= {
                "clip": 0.01,
                "grad_norm": float("nan") if step == 5 else 0.3,
                "mismatch_kl": 1e-6,
                "trained_tokens": 5000.0,
            }
            run.log({**row, "sampled": 20000.0, "skipped": float(step > 5)})
            times = {
                "sample_s": 40.0,
                "learn_s": 20.0,
                "sample_tps": 460.0,
                "learn_tps": 800 + rng.gauss(0, 20),
            }
            run.log_time({"stage": 1, "step": step, **times})
            pairs = [episode(n, HOSTILE if n == 0 else "Use the product.") for n in range(4)]
            run.log_episodes(
                [e for e, _ in pairs], [t for _, t in pairs], label="train", stage=1, step=step
            )
            if (step + 1) % 20 == 0:
                label = "1-reflect" if step + 1 == steps else f"1-reflect@{step + 1}"
                run.log_eval(evaluation(label, 1, step + 1, 0.2 + 0.2 * gain, 0.12 + 0.2 * gain))
        run.advance(Position(2, 0), finished=True)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page]:
    folder = tmp_path_factory.mktemp("runs") / "r3 <i>countdown"
    make_run(folder)
    source = write_report(folder).read_text(encoding="utf-8")
    return source, Page(source)


def test_page_is_whole_and_self_contained(page: tuple[str, Page]) -> None:
    source, parsed = page
    assert parsed.open == []
    assert not {"script", "link", "img", "iframe", "i "} & {tag for tag, _ in parsed.elements}
    assert not re.search(
        r"(src|href)\s*=|url\(|@import|https?:", re.sub(r"&lt;.*?&gt;", "", source)
    )
    assert not any(
        name.startswith("on") for _, attributes in parsed.elements for name in attributes
    )
    assert "default-src 'none'" in source
    assert "all stages done" in parsed.text


def test_hostile_text_is_text(page: tuple[str, Page]) -> None:
    source, parsed = page
    assert "<script" not in source
    assert "\x00" not in source
    assert "\x1b" not in source
    assert "</div><script>alert('x')</script><img src=x onerror=alert(1)> ${title} &" in parsed.text
    assert "org/<b>model</b>" in parsed.text
    assert "r3 <i>countdown" in parsed.text


def test_hostile_names_are_text_everywhere(tmp_path: Path) -> None:
    """Labels, ids, kinds of error, parts and versions come from files that anyone may have
    edited."""
    row = evaluation("start", 0, 0, 0.2, 0.2) | {"label": HOSTILE}
    row["problems"] = [{**p, "first_error": [HOSTILE] * 4} for p in row["problems"]]
    done, texts = episode(0, HOSTILE)
    done = replace(done, parts={HOSTILE: HOSTILE}, problem=replace(done.problem, id=HOSTILE))
    with Run.open(tmp_path, RECIPE) as run:
        run.log_eval(row)
        run.log_eval({**row, "stage": 1, "label": HOSTILE * 2})
        run.log_episodes([done], [texts], label=HOSTILE, stage=0, step=0)
    add_later_eval(tmp_path, row | {"changed": [HOSTILE]})
    versions = {HOSTILE.replace("\ud800", ""): HOSTILE}  # a row's own keys are checked as UTF-8
    (tmp_path / "versions.jsonl").write_text(json.dumps(versions) + "\n")
    source = write_report(tmp_path).read_text(encoding="utf-8")
    cell = episode_html(json.loads((tmp_path / "episodes.jsonl").read_text()))
    for page in (source, cell, curves_html(tmp_path)):
        parsed = Page(page)
        assert parsed.open == []
        assert not {"script", "img"} & {tag for tag, _ in parsed.elements}
        assert "\x1b" not in page
    assert Page(source).text.count("<script>alert('x')</script>") > 10
    inner = dict(Page(cell).elements)["iframe"]["srcdoc"]
    assert inner is not None
    assert not {"script", "img"} & {tag for tag, _ in Page(inner).elements}


def test_trained_turns_are_coloured(page: tuple[str, Page]) -> None:
    # 3 episodes of the one evaluation that logged any, 3 of the first and 3 of the last training
    # step; 1 of each in the legend.
    assert page[1].count("div", "trained") == 9
    assert page[1].count("div", "sampled") == 18
    assert page[1].count("div", "given") == 18
    assert page[1].count("span", "trained") == 1


def test_tables_hold_the_numbers(page: tuple[str, Page]) -> None:
    text = " ".join(page[1].text.split())
    gain = 1 - exp(-59 / 25)
    before, after = (
        evaluation("start", 0, 0, 0.2, 0.12),
        evaluation("1-reflect", 1, 60, 0.2 + 0.2 * gain, 0.12 + 0.2 * gain),
    )
    for row in (before, after):
        said = summarise(row)
        for key in ("first", "second", "fixed"):
            found = said[key]
            assert (
                f"{100 * found.value:.1f} % {100 * found.low:.1f} to {100 * found.high:.1f}" in text
            )
        for kind, count in said["first_errors"].items():
            assert kind in text
            assert str(count) in text
        assert f"{100 * said['pass_at_k'][4].value:.1f} %" in text
    change = compare(before, after)["second"]
    assert change is not None
    assert (
        f"{100 * change.value:+.1f} points {100 * change.low:+.1f} to {100 * change.high:+.1f}"
        in text
    )
    assert "1-reflect against start" in text
    assert "k = 4" in text


def test_curves_break_at_stages_and_skip_what_is_missing(page: tuple[str, Page]) -> None:
    source, parsed = page
    assert parsed.count("figure", "chart") == 13
    reward = source.split('aria-label="Reward"')[1].split("</svg>")[0]
    runs = re.findall(r'class="curve s1" points="([^"]+)"', reward)
    assert [len(run.split()) for run in runs] == [6, 60]
    assert reward.count('class="border"') == 1
    norm = source.split('aria-label="Gradient norm before clipping"')[1].split("</svg>")[0]
    assert [len(run.split()) for run in re.findall(r'class="curve s1" points="([^"]+)"', norm)] == [
        59
    ]  # NaN was stored as null


def test_every_line_of_a_chart_has_a_colour(page: tuple[str, Page]) -> None:
    most = max(Counter(m.curve for m in MEASURES if m.curve).values())
    assert all(f".s{line} {{ stroke:" in page[0] for line in range(1, most + 1))


def test_line_points_sit_where_the_axes_say(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", RECIPE) as run:
        for step, entropy in enumerate((0.0, 1.0, 0.5, 1.0)):
            run.log({"stage": 1, "step": step, "entropy": entropy})
    source = write_report(tmp_path / "run").read_text()
    points = re.findall(r'class="curve s1" points="([^"]+)"', source)[0].split()
    # Across: 44 + 306 * x / 4; down: 168 - 156 * y, on axes from 0 to 1.
    assert points == ["120.5,168.0", "197.0,12.0", "273.5,90.0", "350.0,12.0"]


def test_a_run_that_has_barely_begun(tmp_path: Path) -> None:
    Run.open(tmp_path / "run", RECIPE).close()
    text = Page(write_report(tmp_path / "run").read_text()).text
    assert "No evaluation yet" in text
    assert "at stage 0 of 2, step 0" in text
    with Run.open(tmp_path / "run", RECIPE) as run:
        run.log({"stage": 0, "step": 0, "reward": 0.5, "kl": None})
        parsed = Page(write_report(tmp_path / "run").read_text())
        assert parsed.count("circle", "point") == 1
        run.log_eval({**evaluation("start", 0, 0, 0.5, 0.5, samples=1), "tries": 1})
        with (tmp_path / "run/metrics.jsonl").open("a") as file:
            file.write('{"stage":0,"st')  # a row that is being written
        text = Page(write_report(tmp_path / "run").read_text()).text
    assert "1st try" in text
    assert "What changed" not in text
    assert "pass@k" not in text


def test_evaluations_made_in_another_way_are_not_compared(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", RECIPE) as run:
        run.log_eval(evaluation("start", 0, 0, 0.2, 0.2, samples=1))
        run.log_eval(evaluation("1-reflect", 1, 60, 0.9, 0.2))
    text = Page(write_report(tmp_path / "run").read_text()).text
    assert "start" in text
    assert "What changed" not in text


def test_later_evaluations_are_listed_and_compared_in_their_own_way(tmp_path: Path) -> None:
    make_run(tmp_path / "run", steps=2)
    assert "Evaluated afterwards" not in Page(write_report(tmp_path / "run").read_text()).text

    def later(label: str, samples: int, first: float, changed: list[str]) -> None:
        add_later_eval(
            tmp_path / "run",
            {**evaluation(label, 2, 0, first, 0.2, samples=samples), "changed": changed},
        )

    later("adapter", 8, 0.9, [])  # nothing to compare with: the run itself took 4 samples
    text = (
        Page(write_report(tmp_path / "run").read_text())
        .text.split("Evaluated afterwards")[1]
        .split("Curves")[0]
    )
    assert "x 8" in text
    assert "What changed" not in text
    later("base", 8, 0.1, ["sampling.attempt_tokens=<9>"])  # other settings: still nothing
    text = (
        Page(write_report(tmp_path / "run").read_text())
        .text.split("Evaluated afterwards")[1]
        .split("Curves")[0]
    )
    assert "sampling.attempt_tokens=<9>" in text
    assert "What changed" not in text
    later("base", 8, 0.1, [])
    later(
        "adapter", 4, 0.9, []
    )  # made as the run's own were, so it is compared with the run's start
    text = " ".join(
        Page(write_report(tmp_path / "run").read_text())
        .text.split("Evaluated afterwards")[1]
        .split("Curves")[0]
        .split()
    )
    pairs = [
        (
            evaluation("base", 2, 0, 0.1, 0.2, samples=8),
            evaluation("adapter", 2, 0, 0.9, 0.2, samples=8),
        )
    ]
    pairs += [(evaluation("start", 0, 0, 0.2, 0.12), evaluation("adapter", 2, 0, 0.9, 0.2))]
    for before, after in pairs:
        change = compare(before, after)["first"]
        assert change is not None
        assert (
            f"{after['label']} against {before['label']}{100 * change.value:+.1f} points"
            f" {100 * change.low:+.1f} to" in text
        )
    assert text.count(" against ") == 2 + text.count("base against")


def test_filters_say_what_they_keep(tmp_path: Path) -> None:
    """Counts of two parts by hand: 8 trajectories of 20 steps, 16 of them approved, 5 trajectories
    in whole; 4 right; 3 both."""
    collect = {"kind": "collect", "method": "stepwise", "keep": "all"}
    stages = [collect, {"kind": "filter", "keep": "process", "judge": {"kind": "base"}, "parts": 3}]
    node = recipes.parse(
        {"model": {"name": "m"}, "task": {"name": "gsm8k", "chain": "calls"}, "stages": stages},
        "test",
    )
    counts = {
        "trajectories": 4,
        "states": 10,
        "good_steps": 8,
        "unreadable": 1,
        "unanswered": 0,
        "outcome": 2,
    }
    counts |= {"ends_11": 1, "ends_10": 1, "ends_01": 1, "ends_00": 1}
    with Run.open(tmp_path, node) as run:
        run.log({"stage": 1, "step": 0, "process": 3, "both": 2, "kept": 3} | counts)
        run.log({"stage": 1, "step": 1, "process": 2, "both": 1, "kept": 2} | counts)
    source = write_report(tmp_path).read_text()
    for line in (
        "Stage 1, process <small>2 of 3 parts</small>",
        "8 trajectories, 20 states; kept 5 (62.5%)",
        "outcome right 4 (50.0%); process 5 (62.5%); both 3 (37.5%)",
        "steps approved 80.0%; 2 verdicts unreadable, 0 unanswered: not approved",
        "judge against outcome, last step: agree 50.0%, kappa 0.00, 8 pairs",
    ):
        assert line in source, line
    assert "rules, step by step" not in source


def test_episodes_without_texts(tmp_path: Path) -> None:
    Run.open(tmp_path / "run", RECIPE).close()
    row = {"label": "train", "stage": 1, "step": 0} | episode(1, "")[0].to_json()
    (tmp_path / "run/episodes.jsonl").write_text(json.dumps(row) + "\n")
    assert "no text was stored" in Page(write_report(tmp_path / "run").read_text()).text


def test_folders_that_hold_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no recipe\.yaml"):
        write_report(tmp_path)
    make_run(tmp_path / "run", steps=2)
    (tmp_path / "run/evals.jsonl").write_text(json.dumps({"label": "start"}) + "\n")
    with pytest.raises(UserError, match=r"evals\.jsonl:1: problems: Field required; mend the line"):
        write_report(tmp_path / "run")


ODD: tuple[Any, ...] = (
    None,
    True,
    -1,
    1e308,
    10**30,
    "x",
    "",
    [],
    [None],
    {},
    {"a": 1},
    [[]],
    -5.5,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in a row, the first two of every list."""
    inside = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value[:2])
        if isinstance(value, list)
        else ()
    )
    return [path] * bool(path) + [
        place for key, item in inside for place in places(item, (*path, key))
    ]


@pytest.mark.parametrize("seed", range(4))
def test_rows_that_no_run_writes_are_named(tmp_path: Path, seed: int) -> None:
    """A file that was edited by hand gives a report or one line with its name. Catches: a traceback
    from inside a chart."""
    make_run(tmp_path, steps=3, chunks=1)
    add_later_eval(
        tmp_path, evaluation("base", 0, 0, 0.4, 0.2, problems=4) | {"changed": ["eval.samples=4"]}
    )
    rng, refused = Random(seed), list[str]()
    names = ("metrics", "timings", "evals", "episodes", "later_evals", "versions")
    for _ in range(60):
        path = tmp_path / f"{rng.choice(names)}.jsonl"
        whole = path.read_text()
        rows = [json.loads(line) for line in whole.splitlines()]
        row = rng.choice(rows)
        *way, last = rng.choice(places(row))
        inner = row
        for key in way:
            inner = inner[key]
        if rng.random() < 0.25:
            del inner[last]
        else:
            inner[last] = rng.choice(ODD)
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
        try:
            write_report(tmp_path)
        except UserError as error:
            refused.append(str(error))
        path.write_text(whole)
    assert 5 < len(refused) < 60
    assert not any("\n" in message for message in refused)
    assert (
        sum(bool(re.search(r"\.jsonl:[0-9]+: ", message)) for message in refused) > len(refused) / 2
    ), "by file and line"


def test_a_damaged_row_is_named_by_file_and_line(tmp_path: Path) -> None:
    make_run(tmp_path, steps=3, chunks=1)
    path = tmp_path / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1]["step"] = "two"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: step: .*integer.*; mend the line"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0, 0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (-0.02, 0.03, [-0.02, -0.01, 0, 0.01, 0.02, 0.03]),
        (0, 470, [0, 100, 200, 300, 400, 500]),
    ],
)
def test_ticks_are_round_and_enclose(low: float, high: float, expected: list[float]) -> None:
    assert _ticks(low, high) == pytest.approx(expected)


def test_ticks_of_any_range() -> None:
    rng = Random(2)
    for _ in range(500):
        low, high = sorted(rng.gauss(0, 1) * 10 ** rng.randrange(-9, 9) for _ in range(2))
        ticks = _ticks(low, high)
        assert ticks[0] <= low + 1e-6 * (high - low)
        assert ticks[-1] >= high - 1e-6 * (high - low)
        assert 3 <= len(ticks) <= 7
