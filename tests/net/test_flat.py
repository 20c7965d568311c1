from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from trainfleet.errors import PeerError
from trainfleet.net.flat import Flat, look_of
from trainfleet.net.structure import build, flatten

DTYPES = st.one_of(
    arrays_of.boolean_dtypes(),
    arrays_of.integer_dtypes(endianness="?"),
    arrays_of.floating_dtypes(sizes=(16, 32, 64), endianness="?"),
    arrays_of.unicode_string_dtypes(max_len=5),
    arrays_of.datetime64_dtypes(),
)
ARRAYS = arrays_of.arrays(DTYPES, arrays_of.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))


@given(
    st.dictionaries(
        st.text(max_size=4),
        ARRAYS,
        min_size=1,
        max_size=5,
    )
)
def test_a_dict_of_arrays_that_was_taken_apart_is_built_the_same(body):
    tree, arrays = flatten(body, max_depth=32)
    apart = Flat.of(json.loads(json.dumps(tree)))
    if apart is None:
        assert any(array.dtype.kind == "b" or array.nbytes == 0 for array in body.values())
        return
    whole = b"".join(array.tobytes() + bytes(-array.nbytes % 64) for array in arrays)
    memory = np.frombuffer(bytearray(whole), np.uint8)
    built = apart.build(memory)
    assert built.keys() == body.keys()
    for other in (body, build(tree, memory, classes={})):
        assert all((built[key].dtype, built[key].shape) == (other[key].dtype, other[key].shape) for key in body)
        assert all(built[key].tobytes() == other[key].tobytes() for key in body)
    assert all(np.shares_memory(array, memory) for array in built.values())
    with pytest.raises(PeerError, match="cannot be built"):
        apart.build(memory[: -64 * -(-arrays[-1].nbytes // 64)])


def test_what_is_more_than_arrays_is_not_taken_apart():
    for value in (None, 3, {}, [], {"x": 1}, {"x": ["T", "uint8", [1]]}, {"x": {"y": ["a", "|u1", [1]]}}):
        assert Flat.of(value) is None


def test_bodies_of_one_look_have_one_structure():
    one, other = {"x": np.zeros((2, 3)), "y": np.zeros(4, ">i4")}, {"x": np.ones((2, 3)), "y": np.ones(4, ">i4")}
    assert look_of(one) == look_of(other) and hash(look_of(one)) == hash(look_of(other))
    for changed in (
        {**one, "y": np.zeros(4, "<i4")},
        {**one, "y": np.zeros((2, 2), ">i4")},
        dict(reversed(one.items())),
    ):
        assert look_of(changed) is not None and look_of(changed) != look_of(one)
    for value in (None, [one], {1: one["x"]}, {**one, "z": 3}, {**one, "z": one}):
        assert look_of(value) is None
