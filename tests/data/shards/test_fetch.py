"""Bytes come whole through a connection that breaks, or a sentence says why not."""

from __future__ import annotations

import bz2
import gzip
import os
from datetime import timedelta

import pytest
import zstandard
from data.shards.made import fetched, mood
from hypothesis import given, settings
from hypothesis import strategies as st

from trainfleet.data.shards.cache import ShardCache
from trainfleet.data.shards.fetch import RemoteFile, hasher, local_path, shown, unpacker
from trainfleet.errors import DataError

DATA = bytes(range(256)) * 40
PACKERS = {"gz": gzip.compress, "bz2": bz2.compress, "zstd": zstandard.ZstdCompressor().compress}


def fetch(tmp_path, file, name="shard"):
    cache = ShardCache(tmp_path / "cache", 1 << 20)
    with os.fdopen(cache.open(name, file.fetch), "rb") as opened:
        return opened.read()


def remote(tmp_path, data=DATA, seconds=20.0, **known):
    (tmp_path / "shard").write_bytes(data)
    return RemoteFile(url=f"shaky:/{tmp_path}/shard", timeout=timedelta(seconds=seconds), **known)


@pytest.mark.parametrize("compression", [None, "gz", "bz2", "zstd"])
def test_a_connection_that_breaks_again_and_again_is_gone_on_with(tmp_path, compression, monkeypatch):
    monkeypatch.setattr("trainfleet.data.shards.fetch.pauses", lambda *most: iter([0.001] * 99))
    data = PACKERS[compression](DATA) if compression else DATA
    mood(tmp_path, breaks_after=len(data) // 6 + 1, piece=100)
    file = remote(tmp_path, data, compression=compression, hashes={"sha1": digest("sha1", data)})
    assert fetch(tmp_path, file) == DATA
    assert fetched(tmp_path)["shard"] == len(data), "no byte came twice"


def digest(name, data):
    hashed = hasher(name)
    hashed.update(data)
    return hashed.hexdigest()


def test_a_source_that_cannot_seek_is_read_from_its_beginning_again(tmp_path, monkeypatch):
    monkeypatch.setattr("trainfleet.data.shards.fetch.pauses", lambda *most: iter([0.01] * 99))
    mood(tmp_path, breaks_after=7000, no_seek=True)
    file = remote(tmp_path, seconds=0.3)
    with pytest.raises(DataError, match=r"could not be read for 0.3 s. The last try, at byte 7000: Connection"):
        fetch(tmp_path, file)
    mood(tmp_path, no_seek=True)
    assert fetch(tmp_path, file) == DATA


def test_an_end_before_the_end_is_no_end(tmp_path):
    mood(tmp_path, ends_at=5000)
    with pytest.raises(DataError, match="it ended after 5000 of 10240 bytes"):
        fetch(tmp_path, remote(tmp_path, seconds=0.2))
    with pytest.raises(DataError, match="it ended after 5000 of 10240 bytes"):
        fetch(tmp_path, remote(tmp_path, seconds=0.2, num_bytes=len(DATA)))


def test_what_is_not_there_is_not_waited_for(tmp_path):
    with pytest.raises(DataError, match=r"shaky:/.*gone cannot be read: FileNotFoundError"):
        fetch(tmp_path, RemoteFile(url=f"shaky:/{tmp_path}/gone", timeout=timedelta(hours=1)))


def test_wrong_bytes_are_fetched_anew_then_named(tmp_path):
    mood(tmp_path, flips=77)
    file = remote(tmp_path, hashes={"xxh64": digest("xxh64", DATA)})
    with pytest.raises(DataError, match=r"has the xxh64 .* and should have .* came so 3 times"):
        fetch(tmp_path, file)
    assert fetched(tmp_path)["shard"] == 3 * len(DATA)


@pytest.mark.parametrize("compression", [None, "gz"])
def test_bytes_that_were_wrong_once_leave_no_trace(tmp_path, compression):
    data = PACKERS[compression](DATA) if compression else DATA
    mood(tmp_path, flips=len(data) // 2, flips_first=len(data))
    assert (
        fetch(tmp_path, remote(tmp_path, data, compression=compression, hashes={"sha1": digest("sha1", data)})) == DATA
    )


@pytest.mark.parametrize("compression", ["gz", "bz2", "zstd"])
def test_packed_data_that_end_early_or_are_none_are_damaged(tmp_path, compression):
    packed = PACKERS[compression](DATA)
    with pytest.raises(DataError, match=f"ends in the middle of its {compression} data"):
        fetch(tmp_path, remote(tmp_path, packed[:-9], compression=compression))
    with pytest.raises(DataError, match=f"cannot be unpacked as {compression}"):
        fetch(tmp_path, remote(tmp_path, b"no such thing" * 9, compression=compression))


@pytest.mark.parametrize("compression", ["gz", "bz2", "zstd"])
@settings(max_examples=60)
@given(parts=st.lists(st.binary(max_size=5000), max_size=3), piece=st.integers(1, 3000))
def test_unpacking_in_pieces_of_any_size_gives_the_whole(compression, parts, piece):
    packed = b"".join(PACKERS[compression](part) for part in parts)
    one = unpacker(compression)
    out = b"".join(bytes(x) for i in range(0, len(packed), piece) for x in one.pieces(packed[i : i + piece]))
    assert out == b"".join(parts) and (one.eof or not parts)


@pytest.mark.parametrize("compression", ["gz", "bz2", "zstd"])
def test_what_unpacks_to_much_more_comes_whole(compression):
    packed = PACKERS[compression](bytes(5 << 20))
    one = unpacker(compression)
    assert sum(len(x) for x in one.pieces(packed)) == 5 << 20 and one.eof


def test_a_bomb_does_not_outgrow_the_cache(tmp_path):
    packed = gzip.compress(bytes(30 << 20))
    with pytest.raises(DataError, match=r"may hold 1048576"):
        fetch(tmp_path, remote(tmp_path, packed, compression="gz"))


def test_other_compressions_and_hashes_are_refused():
    with pytest.raises(DataError, match=r"compressed by 'br' are not read"):
        unpacker("br")
    with pytest.raises(DataError, match="hash 'md17'"):
        hasher("md17")


def test_addresses_are_told_from_paths_and_shown_without_secrets():
    assert local_path("s3://bucket/x") is None and str(local_path("file:///a%20b")) == "/a b"
    assert str(local_path("/a/b")) == "/a/b"
    assert shown("https://me:word@host/x?signature=1") == "https://host/x"


def test_reading_ahead_gives_up_sooner_than_whoever_needs_the_shard(tmp_path, monkeypatch):
    monkeypatch.setattr("trainfleet.data.shards.fetch.AHEAD_SECONDS", 0.2)
    mood(tmp_path, breaks_after=0)
    file, cache = remote(tmp_path, seconds=1.0), ShardCache(tmp_path / "cache", 1 << 20)
    with pytest.raises(DataError, match=r"could not be read for 0\.2 s"):
        cache.fetch_ahead("shard", file.fetch, num_bytes=None, keep=set())
    with pytest.raises(DataError, match=r"could not be read for 1 s"):
        fetch(tmp_path, file)
