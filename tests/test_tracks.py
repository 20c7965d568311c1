"""Numbers of the user's own are reduced as declared, and what is no number harms nothing."""

from __future__ import annotations

import json
import logging
import math

import numpy as np
import pytest

from trainfleet.tracks import MAX_NAMES, MAX_WAITING, Tracks, reduced, track


def told(*of_ranks: list[tuple[str, object, str]]) -> dict[str, tuple[int, float]]:
    taken = []
    for numbers in of_ranks:
        tracks = Tracks()
        tracks.step = 7
        for name, value, reduce in numbers:
            tracks.add(name, value, reduce=reduce)  # type: ignore[arg-type]
        taken.append(json.loads(json.dumps(tracks.take(), allow_nan=False)))
    return reduced(taken)


def test_values_of_steps_and_ranks_are_reduced_as_declared() -> None:
    first = [("m", 1.0, "mean"), ("m", 3.0, "mean"), ("s", 1, "sum"), ("hi", 2.0, "max"), ("lo", 5.0, "min")]
    second = [("m", 8.0, "mean"), ("s", 2, "sum"), ("hi", 9.0, "max"), ("lo", 4.0, "min")]
    assert told(first, second) == {"m": (7, 4.0), "s": (7, 3.0), "hi": (7, 9.0), "lo": (7, 4.0)}


def test_a_mean_weighs_its_values() -> None:
    first, second = Tracks(), Tracks()
    first.add("accuracy", 0.5, weight=30)
    second.add("accuracy", 1.0, weight=10)
    second.add("nothing", 1.0, weight=0)
    found = reduced([first.take(), second.take()])
    assert found["accuracy"] == (0, 0.625)
    assert math.isnan(found["nothing"][1])


def test_ranks_may_tell_different_names() -> None:
    assert told([("a", 1.0, "mean")], [("b", 2.0, "mean")], []) == {"a": (7, 1.0), "b": (7, 2.0)}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("reduce", ["mean", "sum", "max", "min"])
def test_what_is_not_finite_is_a_number_too(value: float, reduce: str) -> None:
    (_, found) = told([("x", value, reduce), ("x", 1.0, reduce)])["x"]
    if math.isnan(value):
        assert math.isnan(found)
    else:
        beats = reduce in ("mean", "sum") or (reduce == "max") == (value > 0)
        assert found == (value if beats else 1.0)


def test_arrays_and_tensors_of_one_element_are_numbers() -> None:
    torch = pytest.importorskip("torch")
    weight = torch.tensor(2.0, requires_grad=True)
    assert told([("x", np.float32(1.5), "sum"), ("x", np.ones(1), "sum"), ("x", weight * 2, "sum")]) == {"x": (7, 6.5)}


def test_a_tensor_is_kept_without_its_graph() -> None:
    torch = pytest.importorskip("torch")
    tracks = Tracks()
    tracks.add("x", torch.ones((), requires_grad=True) * 2)
    (waiting,) = tracks._waiting.values()
    assert not waiting[0][0].requires_grad


@pytest.mark.parametrize("value", ["high", None, [1, 2], np.ones(3), {"a": 1}])
def test_what_is_no_number_is_left_out_with_one_warning(value: object, caplog: pytest.LogCaptureFixture) -> None:
    tracks = Tracks()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            tracks.add("x", value)
        tracks.add("y", 1.0)
        taken = tracks.take()
    assert [name for name, *_ in taken] == ["y"]
    assert tracks.left_out == 3
    assert len(caplog.records) == 1 and "'x' is a" in caplog.text


def test_names_and_waiting_values_are_bounded(caplog: pytest.LogCaptureFixture) -> None:
    tracks = Tracks()
    for i in range(MAX_NAMES + 5):
        tracks.add(f"loss of sample {i}", 1.0)
    for _ in range(3 * MAX_WAITING):
        tracks.add("loss of sample 0", 1.0)
    assert max(map(len, tracks._waiting.values())) < MAX_WAITING
    assert tracks.left_out == 5 and len(caplog.records) == 1
    taken = tracks.take()
    assert len(taken) == MAX_NAMES and taken[0][4] == 3 * MAX_WAITING + 1
    tracks.add("another", 1.0)
    assert len(tracks.take()) == 1


def test_an_unknown_reduction_is_refused() -> None:
    with pytest.raises(ValueError, match="reduce='median'; use one of mean, sum, max, min"):
        Tracks().add("x", 1.0, reduce="median")  # type: ignore[arg-type]


def test_a_rank_that_computes_what_another_does_tells_nothing() -> None:
    with Tracks(counts=False) as tracks:
        track("x", 1.0)
    assert tracks.take() == []


def test_track_tells_the_tracks_that_are_open_and_nobody_else() -> None:
    track("x", 1.0)
    with Tracks() as outer:
        outer.step = 3
        track("x", 1.0)
        with Tracks() as inner:
            track("x", 2.0, step=9, reduce="max")
        track("y", 5.0)
    assert [each[:4] for each in inner.take()] == [["x", "max", 9, 2.0]]
    assert [each[:4] for each in outer.take()] == [["x", "mean", 3, 1.0], ["y", "mean", 3, 5.0]]
