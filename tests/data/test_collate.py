from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import pytest

from trainfleet.data.collate import stack_samples, to_torch
from trainfleet.errors import DataError


@dataclass
class Point:
    x: float
    name: str


Pair = namedtuple("Pair", "left right")


@pytest.mark.parametrize(
    ("samples", "dtype"),
    [([1, 2], np.int64), ([1.5, 2], np.float32), ([1, 2.5], np.float32), ([True, False], np.bool_),
     ([np.uint8(3), np.uint8(4)], np.uint8), ([np.zeros(2, np.float16)] * 2, np.float16)],
)  # fmt: skip
def test_numbers_become_arrays_of_the_usual_dtype(samples, dtype):
    batch = stack_samples(samples)
    assert batch.dtype == dtype and len(batch) == 2


def test_the_nesting_stays():
    sample = {"point": Point(1.0, "a"), "pair": Pair(1, [2, (3.0, "z")]), "raw": b"x"}
    batch = stack_samples([sample, sample])
    assert batch["point"].x.tolist() == [1, 1] and batch["point"].name == ["a", "a"]
    assert isinstance(batch["pair"], Pair) and batch["pair"].left.tolist() == [1, 1]
    assert batch["pair"].right[0].tolist() == [2, 2] and batch["pair"].right[1][1] == ["z", "z"]
    assert batch["raw"] == [b"x", b"x"]


@pytest.mark.parametrize(
    ("samples", "sentence"),
    [
        ([{"a": {"b": np.ones(2)}}, {"a": {"b": np.ones(3)}}], r"shapes \(2,\), \(3,\) cannot be stacked at a\.b"),
        ([{"a": 1}, {"b": 1}], r"differ in their keys: \['a'\] and \['b'\]"),
        ([(1, 2), (1,)], "differ in their lengths: 2 and 1"),
        ([{"a": object()}] * 2, "holds a object at a, which cannot be stacked"),
        ([None, None], "NoneType"),
    ],
)
def test_samples_that_do_not_fit_together_are_named(samples, sentence):
    with pytest.raises(DataError, match=sentence):
        stack_samples(samples)


def test_tensors_share_the_memory_of_arrays_and_what_torch_lacks_stays():
    pytest.importorskip("torch")
    array = np.arange(4.0)
    batch = to_torch({"x": array, "big_endian": np.arange(3, dtype=">i4"), "text": np.array(["a"]), "s": ["b"]})
    batch["x"][0] = 9
    assert array[0] == 9
    assert batch["big_endian"].tolist() == [0, 1, 2]
    assert isinstance(batch["text"], np.ndarray) and batch["s"] == ["b"]


def test_tensors_of_unlike_shapes_are_refused_by_name():
    torch = pytest.importorskip("torch")
    with pytest.raises(DataError, match=r"shapes \(2,\), \(3,\)"):
        stack_samples([torch.ones(2), torch.ones(3)])
