"""Pieces of a foreign array make a whole, or it is refused."""

from __future__ import annotations

import numpy as np
import pytest

from trainfleet.checkpoint.foreign.pieces import ForeignArray, ForeignPiece, check_pieces, check_shape, whole_array
from trainfleet.checkpoint.regions import Region
from trainfleet.errors import CheckpointError

WHOLE = np.arange(12, dtype="<f4").reshape(3, 4)


def cut(*boxes):
    pieces = []
    for offsets, shape in boxes:
        part = np.ascontiguousarray(WHOLE[tuple(slice(at, at + n) for at, n in zip(offsets, shape))])
        pieces.append(ForeignPiece(Region(offsets, shape), lambda part=part: part.reshape(-1).view(np.uint8)))
    return ForeignArray(name="w", dtype="float32", shape=(3, 4), pieces=tuple(pieces))


def test_pieces_of_any_cut_are_joined():
    array = cut(((0, 0), (2, 3)), ((0, 3), (3, 1)), ((2, 0), (1, 3)))
    check_pieces(array)
    assert (array.read().view("<f4").reshape(3, 4) == WHOLE).all() and array.num_bytes == 48


@pytest.mark.parametrize(
    ("boxes", "said"),
    [
        ([((0, 0), (2, 4))], "leave a hole"),
        ([((0, 0), (3, 4)), ((1, 1), (1, 1))], "hold the same elements"),
        ([((0, 0), (4, 4))], "does not lie within"),
        ([((-1, 0), (3, 4))], "does not lie within"),
        ([((0,), (12,))], "does not lie within"),
        ([], "leave a hole"),
    ],
)
def test_what_makes_no_whole_is_refused(boxes, said):
    with pytest.raises(CheckpointError, match=said):
        check_pieces(cut(*boxes))


@pytest.mark.parametrize(
    ("dtype", "shape", "said"),
    [
        ("float4", [1], "of dtype float4"),
        (["float32"], [1], "of dtype"),
        ("float32", None, "no shape"),
        ("float32", [1] * 65, "no shape"),
        ("float32", [-1], "the length -1"),
        ("float32", [True], "the length True"),
        ("float32", [1.0], r"the length 1\.0"),
        ("float32", [2**40, 2**40], "more elements than any memory"),
        ("float32", [0, 2**40, 2**40], "more elements than any memory"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(dtype, shape, said):
    with pytest.raises(CheckpointError, match=said):
        check_shape("w", dtype, shape)


def test_an_array_without_elements_has_no_pieces():
    array = whole_array("w", "float32", (0, 4), lambda: pytest.fail("read"))
    check_pieces(array)
    assert array.read().size == 0
