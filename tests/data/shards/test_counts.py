"""Shards are looked at once, and what is kept of that is believed only where it can be so."""

from __future__ import annotations

import os

import pytest

from trainfleet.data.shards.cache import Damaged, ShardCache
from trainfleet.data.shards.counts import UNKNOWN, counted, kept_counts, write_whole
from trainfleet.data.shards.sharded import Shard
from trainfleet.errors import DataError


def shard(name, samples=UNKNOWN):
    def fetch(part):
        part.write(name.encode() * 3)

    return Shard(title=f"at {name}", samples=samples, num_bytes=None, name=name, fetch=fetch)


def test_only_what_nobody_knows_is_looked_at_and_only_once(tmp_path):
    cache, looked = ShardCache(tmp_path, 999), []

    def look(one, descriptor):
        looked.append(one.name)
        return 5, os.fstat(descriptor).st_size

    shards = [shard("a"), shard("b", 7), shard("cc")]
    for _ in (0, 1):
        found = counted(shards, cache, look, title="them")
        assert [(s.samples, s.num_bytes) for s in found] == [(5, 3), (7, None), (5, 6)]
    assert sorted(looked) == ["a", "cc"]
    (file,) = (tmp_path / "index").iterdir()
    file.write_text("[1, 2")
    assert counted(shards, cache, look, title="them")[0].samples == 5 and sorted(looked) == ["a", "a", "cc", "cc"]


def test_a_damaged_shard_is_named(tmp_path):
    def look(one, descriptor):
        raise Damaged("it is upside down")

    with pytest.raises(DataError, match="at a is damaged: it is upside down"):
        counted([shard("a")], ShardCache(tmp_path, 999), look, title="them")


@pytest.mark.parametrize("text", ["", "[]", '{"a": 3}', '{"a": [-1, 3]}', '{"a": ["x", 3]}', '{"a": [1, 2, 3]}'])
def test_garbled_counts_are_none(tmp_path, text):
    (tmp_path / "x").write_text(text)
    assert kept_counts(tmp_path / "x") == {}
    assert kept_counts(tmp_path / "missing") == {}


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(DataError, match="cannot be written"):
        write_whole(tmp_path / "no" / "x", "")
