"""The table of measures: no key twice, and ranges by kind."""

from __future__ import annotations

from minirl.record.measures import LARGEST_COUNT, MEASURES, OUTCOMES, SCORES, measure


def test_no_key_and_no_line_of_a_chart_stands_twice() -> None:
    keys = [m.key for m in MEASURES]
    lines = [(m.curve, m.label) for m in MEASURES if m.curve]
    shown = [m.short or m.label for m in MEASURES if m.format]
    for names in (keys, lines, shown):
        assert len(names) == len(set(names))
    assert [m.key for m in OUTCOMES] == ["first", "second", "fixed"]


def test_every_format_writes_a_number() -> None:
    assert format(0.5, measure("kl").format) == "0.5"
    assert all(format(0.5, m.format) for m in MEASURES if m.format)


def test_ranges() -> None:
    for key, low, high in (("em", 0, 1), ("searches", 0, LARGEST_COUNT), ("new", 0, 1)):
        assert measure(key).accepts(low)
        assert measure(key).accepts(high)
        assert not measure(key).accepts(-1)
        assert not measure(key).accepts(high * 1.01)
        assert not measure(key).accepts(float("nan"))
    assert all(m.kind in ("fraction", "count") for m in SCORES.values())
    assert measure("f1").title == "F1"
    assert measure("searches").title == "Searches"
