from __future__ import annotations

import pytest

from trainfleet.data.reader import Item, Place, Reader, check_shardable
from trainfleet.errors import DataError


class Epochs:
    """What it yields depends on the epoch it is told, as Hugging Face's iterables do."""

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return iter([10 * self.epoch + i for i in range(3)])


class HuggingFaceLike:
    def __init__(self, items):
        self.items = items

    def shard(self, num_shards, index, contiguous=True):
        return HuggingFaceLike(self.items[index::num_shards])

    def __iter__(self):
        return iter(self.items)


def drain(reader):
    items = []
    while True:
        try:
            items.append(next(reader))
        except StopIteration:
            return items


def test_epochs_follow_each_other_and_are_told():
    items = drain(Reader(Epochs(), epochs=2))
    assert [item.sample for item in items] == [0, 1, 2, 10, 11, 12]
    assert items[4] == Item(1, 1, 11)


@pytest.mark.parametrize("count", range(7))
def test_a_reader_goes_on_from_any_place(count):
    reader = Reader(Epochs(), epochs=2)
    for _ in range(count):
        next(reader)
    rest = Reader(Epochs(), epochs=2, place=reader.here())
    assert [item.sample for item in drain(rest)] == [0, 1, 2, 10, 11, 12][count:]


def test_shards_are_taken_in_the_words_of_hugging_face():
    assert [i.sample for i in drain(Reader(HuggingFaceLike(list(range(7))), epochs=1, shard=(1, 3)))] == [1, 4]


def test_a_place_beyond_the_end_is_refused():
    with pytest.raises(DataError, match="ended after 3 samples, before the 5 of the saved position"):
        next(Reader(Epochs(), place=Place(0, 5)))


def test_an_empty_shard_is_named():
    with pytest.raises(DataError, match="HuggingFaceLike, shard 2 of 3, yielded no sample"):
        next(Reader(HuggingFaceLike([1, 2]), shard=(2, 3)))


def test_what_has_no_shards_is_refused():
    check_shardable(HuggingFaceLike([]))
    with pytest.raises(DataError, match="list has no method shard"):
        check_shardable([1])
