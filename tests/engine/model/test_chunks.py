"""A sequence cut by a budget."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from minirl.engine.model.chunks import chunks


def test_a_worked_example() -> None:
    assert list(chunks([3, 4, 5, 9, 1], sum, 8)) == [[3, 4], [5], [9], [1]]
    assert list(chunks([], sum, 8)) == []


@given(st.lists(st.integers(1, 9)), st.integers(1, 20))
def test_chunks_are_all_items_each_as_long_as_can_be(items: list[int], budget: int) -> None:
    found = list(chunks(items, sum, budget))
    assert [item for chunk in found for item in chunk] == items
    assert all(sum(chunk) <= budget or len(chunk) == 1 for chunk in found)
    for chunk, following in pairwise(found):
        assert sum(chunk) + following[0] > budget
