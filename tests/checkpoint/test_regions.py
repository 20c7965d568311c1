from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trainfleet.checkpoint.regions import Region, first_overlap, tiles

boxes = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 3), st.integers(0, 3)), max_size=6).map(
    lambda drawn: [Region((a, b), (m, n)) for a, b, m, n in drawn]
)


def painted(region: Region) -> np.ndarray:
    canvas = np.zeros((8, 8), int)
    canvas[region.slices_in(Region((0, 0), (8, 8)))] = 1
    return canvas


@given(boxes.filter(lambda b: len(b) > 1))
def test_an_overlap_is_what_both_cover(regions):
    a, b, *_ = regions
    common = a.overlap(b)
    both = painted(a) * painted(b)
    assert (painted(common) == both).all() if common else not both.any()


@given(boxes)
def test_overlaps_are_found_wherever_they_are(regions):
    pair = first_overlap(regions)
    crowded = sum((painted(region) for region in regions), np.zeros((8, 8), int)).max() > 1
    assert (pair is not None) == crowded
    if pair:
        assert regions[pair[0]].overlap(regions[pair[1]])


def test_a_point_covers_itself():
    point = Region((), ())
    assert point.overlap(point) == point
    assert point.volume == 1
    assert first_overlap([point, point]) == (0, 1)
    assert tiles([point], ())
    assert not tiles([], ())


def test_a_hole_is_seen():
    assert tiles([Region((0,), (2,)), Region((2,), (3,))], (5,))
    assert not tiles([Region((0,), (2,)), Region((3,), (2,))], (5,))
    assert tiles([], (0, 3))
