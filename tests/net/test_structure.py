from __future__ import annotations

import dataclasses
import enum
import json
import math
from collections import OrderedDict, namedtuple
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from trainfleet.errors import DataError, PeerError
from trainfleet.net.structure import NotAllowed, allow, build, flatten, padded, survey

Pair = namedtuple("Pair", "first second")


@dataclasses.dataclass(frozen=True)
class Sample:
    pixels: Any
    label: Any = 0
    computed: Any = dataclasses.field(init=False, default=None)

    def __post_init__(self) -> None:
        object.__setattr__(self, "computed", "by the constructor")


CLASSES = allow(Pair, Sample)
LIMITS = {"classes": CLASSES, "max_depth": 32, "max_arrays": 1000, "max_bytes": 1 << 20}
DTYPES = st.one_of(
    arrays_of.boolean_dtypes(),
    arrays_of.integer_dtypes(endianness="?"),
    arrays_of.unsigned_integer_dtypes(endianness="?"),
    arrays_of.floating_dtypes(sizes=(16, 32, 64), endianness="?"),
    arrays_of.complex_number_dtypes(sizes=(64, 128)),
    arrays_of.unicode_string_dtypes(max_len=5),
    arrays_of.byte_string_dtypes(max_len=5),
    arrays_of.datetime64_dtypes(),
    arrays_of.timedelta64_dtypes(),
)
ARRAYS = arrays_of.arrays(DTYPES, arrays_of.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.binary(max_size=70), ARRAYS
)
KEYS = st.one_of(st.text(max_size=4), st.integers(), st.booleans(), st.none())
BODIES = st.recursive(
    LEAVES,
    lambda below: st.one_of(
        st.lists(below, max_size=4),
        st.lists(below, max_size=4).map(tuple),
        st.dictionaries(KEYS, below, max_size=4),
        st.builds(Pair, below, below),
        st.builds(Sample, below, below),
    ),
    max_leaves=12,
)


def there_and_back(value: Any, **options: Any) -> Any:
    tree, arrays = flatten(value, max_depth=32)
    tree = json.loads(json.dumps(tree))
    memory = np.zeros(sum(padded(array.nbytes) for array in arrays), np.uint8)
    begin = 0
    for array in arrays:
        memory[begin : begin + array.nbytes] = array
        begin += padded(array.nbytes)
    assert survey(tree, **{**LIMITS, **options}) == memory.nbytes
    return build(tree, memory, classes=CLASSES)


def same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray | np.generic):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, float):
        return a == b or (math.isnan(a) and math.isnan(b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Sample):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    return bool(a == b)


@given(BODIES)
@settings(max_examples=200)
def test_every_nesting_comes_back_the_same(body):
    assert same(there_and_back(body), body)


def test_arrays_of_any_layout_come_back_equal():
    grid = np.arange(24.0).reshape(2, 3, 4)
    for array in (grid.T, grid[:, ::-2], np.asfortranarray(grid), grid[1:1], np.float32(2.5), np.array(7)):
        back = there_and_back(array)
        assert back.dtype == array.dtype and np.array_equal(back, array) and np.shape(back) == np.shape(array)


def test_arrays_that_arrive_are_aligned_and_writable():
    first, second = there_and_back([np.ones(3, np.int8), np.ones(5, np.complex128)])
    second += 1
    assert (first == 1).all() and (second == 2).all()


def test_torch_tensors_of_every_dtype_come_back_equal():
    torch = pytest.importorskip("torch", reason="tensors are torch's")
    names = ["bfloat16", "float16", "float32", "float64", "float8_e4m3fn", "float8_e5m2", "int8", "uint8", "int64"]
    names += ["uint16", "uint32", "complex64", "bool"]
    for name in names:
        for shape in ((3, 2), (), (0, 4)):
            tensor = torch.rand(shape).mul(3).to(getattr(torch, name))
            back = there_and_back({"t": tensor})["t"]
            assert back.dtype == tensor.dtype and back.shape == tensor.shape
            assert torch.equal(back.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_tensors_with_gradient_views_and_conjugates_travel_as_their_values():
    torch = pytest.importorskip("torch", reason="tensors are torch's")
    for tensor in (torch.ones(3, requires_grad=True), torch.nn.Parameter(torch.ones(2)), torch.arange(6).view(2, 3).T):
        assert torch.equal(there_and_back(tensor), tensor.detach())
    spun = torch.tensor([1 + 2j]).conj()
    assert there_and_back(spun).tolist() == [1 - 2j]


def test_a_dataclass_is_rebuilt_without_its_constructor():
    sample = Sample(np.ones(2))
    object.__setattr__(sample, "computed", "changed since")
    assert there_and_back(sample).computed == "changed since"


def test_other_mappings_arrive_as_dicts():
    back = there_and_back(OrderedDict(a=1, b=[2]))
    assert type(back) is dict and back == {"a": 1, "b": [2]}


def test_a_class_that_is_not_allowed_is_refused_by_name():
    tree = flatten({"x": Pair(1, Sample(2))}, max_depth=9).tree
    with pytest.raises(NotAllowed, match=r"holds a .*:Sample, which is not among .* classes=allow"):
        survey(tree, **{**LIMITS, "classes": allow(Pair)})
    with pytest.raises(DataError, match="int is neither a dataclass nor a named tuple"):
        allow(int)


class Colour(enum.IntEnum):
    RED = 1


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"a": [1, {2, 3}]}, "A set at a.1 cannot travel"),
        (np.array([object()]), "dtype object cannot travel"),
        (np.zeros(2, [("x", "i4")]), "cannot travel"),
        (np.ma.masked_array([1], [True]), "A MaskedArray of|A MaskedArray"),
        (Colour.RED, "A Colour cannot travel"),
        ({(1, 2): 3}, r"the key \(1, 2\)"),
        (np.longdouble(1), "cannot travel"),
    ],
)
def test_what_cannot_travel_is_refused_with_its_place(value, words):
    with pytest.raises(DataError, match=words):
        flatten(value, max_depth=32)


def test_a_body_that_holds_itself_is_refused():
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(DataError, match=r"nested deeper than 32 at 0\.0\.0"):
        flatten(loop, max_depth=32)


@pytest.mark.parametrize(
    "tree",
    [
        ["a", "<f4", [-1]],
        ["a", "<f4", [1 << 62]],
        ["a", "<f4", [1 << 40, 1 << 40]],
        ["a", "<f4", [True]],
        ["a", "<f4", [1.0]],
        ["a", "<f4", [1] * 40],
        ["a", "O", [1]],
        ["a", "|V8", [1]],
        ["a", "<M8[zz]", [1]],
        ["a", "<U999999999", [0]],
        ["a", "<f4"],
        ["a"],
        ["n", 3],
        ["b", -1],
        ["b", 1 << 40],
        ["T", "quint8", [1]],
        ["z", 1],
        [],
        [[]],
        ["N", [], 1],
        ["N", f"{__name__}:Pair", 1],
        ["N", f"{__name__}:Sample", 1],
        ["D", f"{__name__}:Sample", {"pixels": 1, "__class__": 2}],
        ["D", f"{__name__}:Pair", {"first": 1}],
        ["D", f"{__name__}:Sample", 7],
        ["d", [["l"], 1]],
        ["d", 5],
        ["d", [1, 2, 3]],
        ["l", *([["b", 0]] * 1001)],
    ],
)
def test_trees_that_no_sender_writes_are_refused(tree):
    with pytest.raises((PeerError, NotAllowed)):
        survey(tree, **LIMITS)


def test_a_tree_that_is_too_deep_is_refused():
    tree: Any = 1
    for _ in range(33):
        tree = ["l", tree]
    with pytest.raises(PeerError, match="nested deeper than 32"):
        survey(tree, **LIMITS)


def test_booleans_other_than_0_and_1_are_refused():
    with pytest.raises(PeerError, match="neither 0 nor 1"):
        build(["a", "|b1", [4]], np.full(64, 2, np.uint8), classes={})


def test_in_shared_memory_what_was_checked_is_copied():
    memory = np.ones(64, np.uint8)
    mask = build(["a", "|b1", [4]], memory, classes={}, shared=True)
    memory[:] = 7
    assert mask.tobytes() == b"\1\1\1\1"
