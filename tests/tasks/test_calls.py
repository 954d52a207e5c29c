"""Calls of the calculator in the chains of GSM8K: by hand, and on every mark of the real files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minirl.tasks.calls import _MARK, Call, Chain, _agrees, has_right_calls, read_chain

GSM8K = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k"


def test_marks_of_gsm8k_are_calls() -> None:
    solution = "She sold 48/2 = <<48/2=24>>24 clips.\nIn all 48+24 = $<<48+24=72>>72.\n#### 72"
    assert read_chain(solution) == Chain(
        (Call("She sold 48/2", "48/2"), Call("24 clips.\nIn all 48+24", "48+24")), "72.", "72"
    )
    assert has_right_calls(solution)
    assert not has_right_calls(solution.replace("=24>>", "=25>>"))
    assert not has_right_calls("No calls. #### 3")
    assert read_chain("p = <<14=14>>14 of 2+1=<<2+1=3>>3.\n#### 3") == Chain(
        (Call("p = 14 of 2+1", "2+1"),), "3.", "3"
    )
    assert not has_right_calls("p = <<14=14>>14.\n#### 14")


@pytest.mark.slow
@pytest.mark.skipif(not GSM8K.exists(), reason="no ../shared/data")
def test_the_marks_of_gsm8k_are_reproduced() -> None:
    """Catches: a rule against ambiguity that refuses what people write. The two that are left
    divide by `//`."""
    rows = [
        json.loads(line)
        for name in ("train", "test")
        for line in (GSM8K / f"{name}.jsonl").read_text().splitlines()
    ]
    marks = [mark for row in rows for mark in _MARK.finditer(row["answer"])]
    wrong = [mark["expression"] for mark in marks if not _agrees(mark["expression"], mark["value"])]
    assert (len(marks), sorted(wrong)) == (27_998, ["180//3", "560//10"])
