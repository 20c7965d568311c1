from __future__ import annotations

import logging
import os
import signal

import numpy as np
import pytest

from trainfleet.data.iterable import IterableBatches
from trainfleet.errors import DataError


class Count:
    """0 .. length-1, once an epoch."""

    def __init__(self, length):
        self.length, self.reads = length, 0

    def __iter__(self):
        for i in range(self.length):
            self.reads += 1
            yield {"i": i}


class Shardable(Count):
    def __init__(self, length, index=0, count=1):
        super().__init__(length)
        self.index, self.count = index, count

    def shard(self, index, count):
        return Shardable(self.length, index, count)

    def __iter__(self):
        return ({"i": i} for i in range(self.index, self.length, self.count))


class Remembering(Count):
    """Has a state of its own, and so need not be read again."""

    at = 0

    def __iter__(self):
        while self.at < self.length:
            self.at += 1
            self.reads += 1
            yield {"i": self.at - 1}
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def open_ranks(make, *, size, world_size, **settings):
    settings.setdefault("collate", "numpy")
    return [IterableBatches(make(), size=size, rank=r, world_size=world_size, **settings) for r in range(world_size)]


def take(ranks, steps):
    batches = [next(stream) for _ in range(steps) for stream in ranks]
    return [int(i) for b in batches for i, w in zip(b["i"], b.get("weight", np.ones(len(b["i"])))) if w]


def close(ranks):
    for stream in ranks:
        stream.close()


@pytest.mark.parametrize("workers", [0, 1, 4])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_stream_of_an_iterable_is_the_same_for_any_ranks_and_workers(world_size, workers):
    ranks = open_ranks(lambda: Count(20), size=6 // world_size, world_size=world_size, workers=workers)
    try:
        assert take(ranks, 9) == [i % 20 for i in range(54)]
        states = [stream.state_dict() for stream in ranks]
        assert all(state == states[0] for state in states)
        assert (states[0]["position"], states[0]["epoch"], states[0]["offset"]) == (54, 2, 14)
    finally:
        close(ranks)


@pytest.mark.parametrize("make", [Count, Remembering])
def test_an_iterable_resumes_at_another_number_of_ranks(make, caplog):
    ranks = open_ranks(lambda: make(50), size=2, world_size=3, workers=1)
    seen = take(ranks, 5)
    state = ranks[0].state_dict()
    close(ranks)
    sources = [make(50), make(50)]
    with caplog.at_level(logging.INFO):
        ranks = open_ranks(iter(sources).__next__, size=4, world_size=2)
        for stream in ranks:
            stream.load_state_dict(state)
        seen += take(ranks, 5)
    assert seen == [i % 50 for i in range(70)]
    if make is Count:
        assert "reading 30 samples again" in caplog.text
    else:
        assert sources[0].reads == 40  # nothing was read again


@pytest.mark.parametrize(
    ("short", "sizes"), [("drop", [[4, 4], [4, 4]]), ("keep", [[4, 4, 2], [4, 4, 1]]), ("pad", [[4, 4, 4], [4, 4, 4]])]
)
@pytest.mark.parametrize("workers", [0, 1])
def test_all_ranks_see_the_end_of_a_finite_pass_at_the_same_batch(short, sizes, workers):
    ranks = open_ranks(lambda: Count(19), size=4, world_size=2, epochs=1, short=short, workers=workers)
    try:
        for _ in range(2):
            batches = [list(stream) for stream in ranks]
            assert [[len(b["i"]) for b in mine] for mine in batches] == sizes
            assert ranks[0].dropped == (3 if short == "drop" else 0)
            for stream in ranks:
                stream.rewind()
                stream.dropped = 0
    finally:
        close(ranks)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_shards_are_dealt_to_the_ranks_and_a_step_takes_the_same_samples(world_size):
    ranks = open_ranks(lambda: Shardable(40), size=8 // world_size, world_size=world_size, shards=4)
    for step in range(5):
        assert sorted(take(ranks, 1)) == list(range(8 * step, 8 * step + 8))
    assert sorted(take(ranks, 1)) == list(range(8))  # each shard begins again


def test_shards_resume_at_a_number_of_ranks_that_divides_them():
    ranks = open_ranks(lambda: Shardable(400), size=2, world_size=4, shards=4, workers=1)
    seen = take(ranks, 5)
    state = ranks[3].state_dict()
    close(ranks)
    ranks = open_ranks(lambda: Shardable(400), size=6, world_size=2, shards=4)
    for stream in ranks:
        stream.load_state_dict(state)
    seen += take(ranks, 5)
    assert sorted(seen) == list(range(100))
    with pytest.raises(DataError, match=r"shards=4 with 3 ranks.*Try shards=3"):
        open_ranks(lambda: Shardable(400), size=4, world_size=3, shards=4)
    with pytest.raises(DataError, match="counts samples of 4 shards"):
        IterableBatches(Shardable(400), size=4).load_state_dict(state)


def test_a_torch_dataset_that_asks_for_its_worker_reads_its_shard():
    data = pytest.importorskip("torch.utils.data")

    class Stream(data.IterableDataset):
        def __iter__(self):
            info = data.get_worker_info()
            index, count = (info.id, info.num_workers) if info is not None else (0, 1)
            return iter(range(index, 24, count))

    ranks = [IterableBatches(Stream(), size=4, rank=r, world_size=2, shards=4, collate="numpy") for r in range(2)]
    assert sorted(next(ranks[0]).tolist() + next(ranks[1]).tolist()) == list(range(8))
    assert data.get_worker_info() is None
    assert next(IterableBatches(Stream(), size=4)).tolist() == [0, 1, 2, 3]


def test_a_reader_that_was_killed_is_replaced_and_loses_nothing(caplog):
    with IterableBatches(Count(100), size=5, workers=1, collate="numpy") as stream:
        seen = [i for _ in range(3) for i in next(stream)["i"].tolist()]
        os.kill(stream.worker_pids[0], signal.SIGKILL)
        seen += [i for _ in range(10) for i in next(stream)["i"].tolist()]
    assert seen == list(range(65))
    assert "was killed by SIGKILL" in caplog.text


def test_skipped_samples_of_an_iterable_keep_their_slot():
    def transform(sample):
        if sample["i"] == 2:
            raise ValueError("rotten")
        return sample

    stream = IterableBatches(
        Count(8), size=4, transform=transform, bad="skip", collate="numpy", on_skip=lambda *_: None
    )
    assert next(stream)["weight"].tolist() == [1, 1, 0, 1] and stream.skipped == 1
    with pytest.raises(DataError, match="Sample 2 of the source Count failed: ValueError: rotten"):
        next(IterableBatches(Count(8), size=4, transform=transform))


@pytest.mark.parametrize(
    ("source", "settings", "sentence"),
    [
        (Count(0), {}, "The source Count yielded no sample"),
        (iter([{"i": 0}] * 3), {}, "it can be iterated only once"),
        (Count(8), {"shards": 2}, "no method shard"),
        (Shardable(8), {"shards": 2, "epochs": 1}, "no rank can know when the others' shards end"),
    ],
)
def test_what_cannot_be_read_on_is_refused(source, settings, sentence):
    with pytest.raises(DataError, match=sentence):
        next(IterableBatches(source, size=4, **settings))


def test_an_error_while_reading_says_where():
    def rows():
        yield {"i": 0}
        raise OSError("the line is cut")

    class Rows:
        def __iter__(self):
            return rows()

    with pytest.raises(DataError, match="failed after 1 samples of epoch 0: OSError: the line is cut"):
        next(IterableBatches(Rows(), size=2))
