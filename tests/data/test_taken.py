"""A stream can say which samples its last batches held, whoever made them, and however they were drawn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from trainfleet.data import IterableBatches, LocalBatches
from trainfleet.data.feed import DataService, RemoteBatches
from trainfleet.data.split import Part


def values(batch: Any) -> list[int]:
    return [int(each) for each in np.asarray(batch).ravel()]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("part", [None, 0.25])
def test_the_indices_are_those_of_the_samples_in_the_batches(workers: int, part: float | None) -> None:
    source = np.arange(103)
    own = Part(source, part, held_out=False) if part else None
    with LocalBatches(source, size=4, rank=1, world_size=2, seed=3, workers=workers, part=own, epochs=3) as stream:
        held = [values(next(stream)) for _ in range(20)]
        found = stream.taken(20)
    assert [[sample.index for sample in batch] for batch in found] == held
    assert len({sample.epoch for batch in found for sample in batch}) > 1
    assert [[sample.index for sample in batch] for batch in stream.taken(2)] == held[-2:]


def test_slots_that_were_filled_up_and_stand_ins_say_so() -> None:
    def transform(sample: Any) -> Any:
        if sample == 5:
            raise ValueError("bad")
        return sample

    stream = LocalBatches(np.arange(7), size=4, shuffle=False, short="pad", bad="skip", transform=transform, epochs=1)
    batches = list(stream)
    first, second = stream.taken(2)
    assert [str(each) for each in second] == [
        "sample 4 (position 4 of epoch 0)",
        "the stand-in for sample 5 (position 5 of epoch 0)",
        "sample 6 (position 6 of epoch 0)",
        "sample 0 (position 0 of epoch 0), of weight 0",
    ]
    assert len(batches) == 2 and all(each.counts for each in first)


class Rows:
    def __init__(self, index: int = 0, count: int = 1) -> None:
        self.index, self.count = index, count

    def shard(self, index: int, count: int) -> Rows:
        return Rows(index, count)

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.index, 40, self.count))


def test_of_what_is_only_iterated_positions_are_known() -> None:
    with IterableBatches(Rows(), size=3, rank=1, world_size=2) as stream:
        held = [values(next(stream)) for _ in range(4)]
        assert [[sample.position for sample in batch] for batch in stream.taken(4)] == held
    with IterableBatches(Rows(), size=4, rank=1, world_size=2, shards=4) as stream:
        held = [values(next(stream)) for _ in range(3)]
        found = stream.taken(3)
    # Row r of shard s is the number r * 4 + s.
    assert [[sample.row * 4 + sample.shard for sample in batch] for batch in found] == held  # type: ignore[operator]
    assert str(found[0][0]) == "row 0 of shard 1"


@pytest.mark.parametrize("part", [None, 0.25])
def test_of_fed_batches_too_unless_parts_of_the_source_lie_elsewhere(part: float | None) -> None:
    source = np.arange(40)
    local = LocalBatches(source, size=4, seed=3, part=Part(source, part, held_out=False) if part else None)
    with (
        DataService(local, address="127.0.0.1:0").open() as service,
        RemoteBatches([str(service.address)], as_numpy=True, rank=1, world_size=2) as stream,
    ):
        held = [values(next(stream)) for _ in range(3)]
        found = [[sample.index for sample in batch] for batch in stream.taken(3)]
    assert found == (held if part is None else [[None] * 4] * 3)
