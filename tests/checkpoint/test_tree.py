from __future__ import annotations

import enum
import json
import math
import random
from collections import OrderedDict, namedtuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainfleet.checkpoint.tree import StoredArray, decode, encode, merged
from trainfleet.errors import CheckpointError
from trainfleet.state import PerRank, ShardedArray

leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary()
    | st.sampled_from([np.float32(0.1), np.int64(-3), np.bool_(True), np.complex128(1 + 2j), np.float64("nan")])
)
keys = st.text() | st.integers() | st.just("$")
states = st.recursive(
    leaves,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(keys, inner),
    max_leaves=20,
)


def same(a, b) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    if isinstance(a, float | np.floating) and math.isnan(a):
        return math.isnan(b)
    if isinstance(a, float):
        return a == b and math.copysign(1, a) == math.copysign(1, b)
    return bool(a == b)


def through_json(value):
    return decode(json.loads(json.dumps(encode(value, "s", pytest.fail), allow_nan=False)), "s")


@given(states)
def test_every_leaf_comes_back_with_its_value_and_its_type(state):
    assert same(through_json(state), state)


def test_the_state_of_pythons_generator_comes_back():
    state = random.Random(7).getstate()
    assert through_json({"state": state}) == {"state": state}


def test_the_state_of_numpys_generator_comes_back():
    state = np.random.default_rng(7).bit_generator.state
    assert through_json(state) == state


def test_other_mappings_and_subclasses_become_the_plain_kind():
    class Version(str):
        pass

    assert through_json(OrderedDict(a=Version("2.1"))) == {"a": "2.1"}


def test_arrays_are_taken_under_their_paths():
    taken = []
    piece = ShardedArray(name="w", global_shape=(4,), offsets=(2,), local=np.zeros(2, np.float32))
    state = {"a/b": {"~": piece}, "l": [np.zeros((2, 2), np.int16)], 3: PerRank({"r": np.zeros(1, np.uint8)})}
    found = decode(json.loads(json.dumps(encode(state, "s", taken.append))), "s")
    assert [(t.path, t.dtype, t.per_rank) for t in taken] == [
        ("s/a~1b/~0", "float32", False),
        ("s/l/0", "int16", False),
        ("s/3/r", "uint8", True),
    ]
    assert found["a/b"]["~"] == StoredArray("s/a~1b/~0", "float32", (4,), "numpy", True)
    assert found["l"] == [StoredArray("s/l/0", "int16", (2, 2), "numpy", False)]
    assert isinstance(found[3], PerRank)


Point = namedtuple("Point", "x y")


class Colour(enum.IntEnum):
    RED = 1


@pytest.mark.parametrize(
    ("value", "kind"),
    [(object(), "object"), ({1, 2}, "set"), (Point(1, 2), "Point"), (Colour.RED, "Colour"), (np.str_("a"), "str_")],
)
def test_what_cannot_be_stored_is_named_with_its_path(value, kind):
    with pytest.raises(CheckpointError, match=rf"s/deep/0 cannot be stored: it is a {kind}"):
        encode({"deep": [value]}, "s", pytest.fail)


def test_keys_of_other_types_are_refused():
    with pytest.raises(CheckpointError, match="no string or integer"):
        encode({(1, 2): 3}, "s", pytest.fail)


def test_a_sharded_array_is_not_one_ranks_own():
    piece = ShardedArray(name="w", global_shape=(4,), offsets=(2,), local=np.zeros(2, np.float32))
    with pytest.raises(CheckpointError, match="inside a PerRank"):
        encode({"x": PerRank(piece)}, "s", pytest.fail)


def test_a_node_of_a_later_version_is_refused():
    with pytest.raises(CheckpointError, match="newer"):
        decode({"$": "quaternion"}, "s")


def test_merging_completes_the_first_with_what_only_the_second_has():
    assert merged({"a": 1, "b": {"x": 1}}, {"a": 2, "b": {"y": 2}, "c": 3}) == {"a": 1, "b": {"x": 1, "y": 2}, "c": 3}
