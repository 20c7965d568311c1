from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest

from trainfleet.batch import (
    BatchStream,
    arrays,
    batch_size,
    call_with_batch,
    cut_batch,
    map_arrays,
    to_device,
    weighted_rows,
)
from trainfleet.errors import DataError


class Pair(NamedTuple):
    x: Any
    y: Any


@dataclass
class Sample:
    image: Any
    label: Any
    name: str = "a"


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


@pytest.mark.parametrize(
    "batch",
    [
        ones(2),
        [ones(2), "text", 3, None],
        (ones(2), [ones(1)]),
        {"x": ones(2), "deep": {"y": (ones(1),)}},
        OrderedDict(b=ones(2), a=ones(1)),
        Pair(ones(2), [ones(1)]),
        Sample(ones(2), {"y": ones(1)}),
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_any_nesting_keeps_its_form(batch):
    doubled = map_arrays(lambda array: array * 2, batch)
    assert type(doubled) is type(batch)
    assert [(a == 2).all() for a in arrays(doubled)] == [True] * len(arrays(batch))
    assert [(a == 1).all() for a in arrays(batch)] == [True] * len(arrays(batch)), "the batch itself is left alone"
    assert [a.shape for a in arrays(doubled)] == [a.shape for a in arrays(batch)]


def test_other_leaves_stay_as_they_are():
    marker = object()
    assert map_arrays(lambda array: 0, {"a": marker, "b": "text", "c": [1.5, None]}) == {
        "a": marker,
        "b": "text",
        "c": [1.5, None],
    }


def test_the_size_is_that_of_the_first_array_with_a_dimension():
    assert batch_size({"scale": np.float32(2), "x": ones(5, 3)}) == 5
    with pytest.raises(DataError, match="type dict holds no array"):
        batch_size({"a": 1})


def test_a_batch_is_cut_into_equal_parts_of_its_samples():
    batch = {"input": np.arange(8).reshape(4, 2), "pair": (np.arange(4), np.float32(3)), "name": "x"}
    first, second = cut_batch(batch, 2)
    assert first["input"].tolist() == [[0, 1], [2, 3]] and second["pair"][0].tolist() == [2, 3]
    assert first["pair"][1] == second["pair"][1] == 3 and second["name"] == "x"
    assert cut_batch(batch, 1)[0] is batch
    with pytest.raises(DataError, match=r"plan.microbatches is 3, which does not divide the 4 samples"):
        cut_batch(batch, 3)
    with pytest.raises(DataError, match=r"holds an array of shape \(5,\)"):
        cut_batch([np.zeros(4), np.zeros(5)], 2)


def test_a_batch_goes_to_a_device_whole():
    torch = pytest.importorskip("torch", reason="devices are torch's")
    moved = to_device({"x": [torch.ones(2)], "n": np.ones(1), "s": "a"}, "meta")
    assert moved["x"][0].is_meta and isinstance(moved["n"], np.ndarray) and moved["s"] == "a"


def test_a_stream_is_what_has_the_four_methods():
    class Stream:
        def __iter__(self) -> Iterator[Any]:
            return self

        def __next__(self) -> Any:
            raise StopIteration

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: Mapping[str, Any], /) -> None: ...

    assert isinstance(Stream(), BatchStream)
    assert not isinstance(iter([1]), BatchStream)


def test_weights_of_samples_are_told_from_the_batch():
    weight = ones(4)
    assert weighted_rows({"input": 1, "weight": weight}) == ({"input": 1}, weight)
    batch, found = weighted_rows((ones(4, 2), np.arange(4), weight))
    assert found is weight and len(batch) == 2
    assert weighted_rows((ones(4, 2), np.arange(4)))[1] is None
    assert weighted_rows((ones(4, 2), ones(4, 2), np.arange(4)))[1] is None, "integers are no weights"


def test_a_model_is_called_with_what_it_takes():
    assert call_with_batch(lambda x: x, ("x", "y")) == "x"
    assert call_with_batch(lambda x: x, {"input": 1, "target": 2}) == 1
    named = {"x": 1, "weight": 2}
    assert call_with_batch(lambda x: [x], named) == [1], "weights are for the loss"
    assert call_with_batch(lambda x, weight: [x, weight], named) == [1, 2]
    assert call_with_batch(lambda **more: more, named) == named
