"""`cut` against every way of cutting."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainfleet.balance import cut


def largest_of_the_best(costs, parts):
    """The oracle: try them all."""
    best = float("inf")
    for inner in combinations(range(1, len(costs)), parts - 1):
        edges = [0, *inner, len(costs)]
        best = min(best, max(sum(costs[a:b]) for a, b in pairwise(edges)))
    return best


@given(st.lists(st.integers(0, 20), min_size=1, max_size=8), st.data())
def test_the_largest_part_is_as_small_as_can_be(costs, data):
    parts = data.draw(st.integers(1, len(costs)))
    ranges = cut(costs, parts)
    assert len(ranges) == parts
    assert [i for part in ranges for i in part] == list(range(len(costs)))
    assert all(len(part) for part in ranges)
    assert max(sum(costs[i] for i in part) for part in ranges) == largest_of_the_best(costs, parts)


def test_equal_costs_are_cut_evenly():
    assert cut([1.0] * 6, 3) == [range(2), range(2, 4), range(4, 6)]


def test_one_part_is_everything_and_as_many_parts_as_costs_are_singles():
    assert cut([3, 1, 2], 1) == [range(3)]
    assert cut([3, 1, 2], 3) == [range(1), range(1, 2), range(2, 3)]


@pytest.mark.parametrize("parts", [0, -1, 4])
def test_more_parts_than_costs_or_none_are_refused(parts):
    with pytest.raises(ValueError, match="3 costs"):
        cut([1, 2, 3], parts)
