"""MDS datasets are read as they were written, damaged ones are named, and nothing is unpickled."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from data.shards.made import fetched, mood, same, sample, used, write_mds
from hypothesis import given, settings
from hypothesis import strategies as st

from trainfleet.data.shards.cache import Damaged
from trainfleet.data.shards.encodings import SCALARS
from trainfleet.data.shards.mds import MosaicShards, cut, read_index
from trainfleet.data.source import open_source
from trainfleet.errors import DataError

WRITTEN = Path(__file__).with_name("written_by_mosaicml_streaming")


@pytest.mark.parametrize("compression", [None, "zstd", "gz", "bz2"])
@pytest.mark.parametrize("scheme", ["", "file://", "shaky:/"])
def test_samples_are_those_that_were_written(tmp_path, compression, scheme):
    write_mds(tmp_path / "d", compression=compression, hashes=("sha1", "xxh64"))
    source = open_source("mds", url=f"{scheme}{tmp_path}/d", cache=tmp_path / "cache")
    assert len(source) == 60 and source.blocks.sizes == (8,) * 7 + (4,)
    order = random.Random(1).sample(range(60), 60)
    assert all(same(source[i], sample(i)) for i in order)
    if compression is None and scheme != "shaky:/":
        assert not (tmp_path / "cache").exists(), "what lies on this host is read where it is"


def test_a_dataset_of_mosaicml_streaming_is_read(tmp_path):
    """Written by its MDSWriter 0.13.0, with zstd: a column of each encoding; what went in lies beside it as JSON."""
    values = json.loads((WRITTEN / "values.json").read_text())
    source = MosaicShards(WRITTEN, columns=list(values[0]), mode=None, cache=tmp_path)
    assert len(source) == len(values) and len(source.blocks.sizes) > 1
    for row, wanted in enumerate(values):
        for name, value in wanted.items():
            found = source[row][name]
            if name in ARRAYS:
                assert (str(found.dtype), found.tolist()) == tuple(value)
            elif name == "bytes":
                assert found == bytes(value)
            elif name in ("str_int", "str_decimal"):
                assert str(found) == value
            else:
                assert found == value


ARRAYS = ["any", "fixed", "typed", "jpeg", "png", "pil", *SCALARS]


def test_columns_can_be_chosen_and_named(tmp_path):
    write_mds(tmp_path)
    assert MosaicShards(tmp_path, columns=["i"])[9] == {"i": 9}
    assert MosaicShards(tmp_path, columns={"target": "i"})[9] == {"target": 9}
    with pytest.raises(DataError, match=r"no column label\. It has i, note, x"):
        MosaicShards(tmp_path, columns=["label"])


def edited(folder, change):
    index = json.loads((folder / "index.json").read_text())
    change(index["shards"])
    (folder / "index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s[1].update(format="csv"), "Shard 1 .* format 'csv'"),
        (lambda s: s[1].update(version=1), "version 1"),
        (lambda s: s[0]["raw_data"].update(basename="../secret"), "leads out of the dataset"),
        (lambda s: s[0]["raw_data"].update(basename="/etc/passwd"), "leads out of the dataset"),
        (lambda s: s[0]["raw_data"].update(basename="s3://other/x"), "leads out of the dataset"),
        (lambda s: s[0].update(samples=-1), "no number of them"),
        (lambda s: s[0].update(samples=10**9), "cannot hold"),
        (lambda s: s[0].pop("column_sizes"), "column_sizes"),
        (lambda s: s[0].update(column_names=["a"]), "1 names of columns, 3 encodings"),
        (lambda s: s[2].update(column_names=["i", "note", "y"]), "lack the columns x"),
        (lambda s: s[0].update(column_encodings=["pkl", "str", "str"]), "nothing is unpickled"),
        (lambda s: s[0].update(column_encodings=["new", "str", "str"]), "encoding 'new'"),
        (lambda s: s[0].update(zip_data=s[0]["raw_data"], compression="br:3"), "compressed by br"),
        (lambda s: s.clear(), "names 0 shards"),
    ],
)
def test_an_index_that_cannot_be_is_refused_in_a_sentence(tmp_path, change, words):
    write_mds(tmp_path)
    with pytest.raises(DataError, match=words):
        MosaicShards(edited(tmp_path, change))


def test_a_pickled_column_does_not_matter_where_it_is_left_out(tmp_path):
    write_mds(tmp_path)
    edited(tmp_path, lambda shards: [s.update(column_encodings=["int", "pkl", "ndarray:uint16:50"]) for s in shards])
    assert MosaicShards(tmp_path, columns=["i"])[3] == {"i": 3}


def test_a_folder_without_index_is_named(tmp_path):
    with pytest.raises(DataError, match=r"index.json cannot be read.*`url` is the folder"):
        MosaicShards(tmp_path)
    with pytest.raises(DataError, match=r"index.json cannot be read"):
        MosaicShards(f"shaky:/{tmp_path}")


def test_a_short_shard_of_this_host_is_named(tmp_path):
    write_mds(tmp_path)
    shard = tmp_path / "shard.00001.mds"
    shard.write_bytes(shard.read_bytes()[:-1])
    source = MosaicShards(tmp_path)
    assert source[7]["i"] == 7
    with pytest.raises(DataError, match=r"shard.00001.mds has .* should have .* by its index"):
        source[8]


def test_a_flipped_bit_on_the_way_is_found_by_the_hash(tmp_path):
    write_mds(tmp_path / "d")
    mood(tmp_path / "d", flips=200)
    source = MosaicShards(f"shaky:/{tmp_path}/d", cache=tmp_path / "cache")
    with pytest.raises(DataError, match=r"xxh64 .* and should have .* It came so 3 times"):
        source[0]
    assert used(tmp_path / "cache") == 0
    mood(tmp_path / "d")
    assert same(source[0], sample(0))


def test_a_cached_shard_whose_table_is_garbled_is_fetched_anew(tmp_path):
    write_mds(tmp_path / "d")
    source = MosaicShards(f"shaky:/{tmp_path}/d", cache=tmp_path / "cache")
    assert same(source[0], sample(0))
    (cached,) = [f for f in (tmp_path / "cache").iterdir() if f.name != "lock"]
    data = bytearray(cached.read_bytes())
    data[4:12] = b"\xff" * 8
    cached.write_bytes(data)
    assert same(source[0], sample(0)), "fetched anew"
    cached.write_bytes(data)
    with pytest.raises(DataError, match="damaged: sample 0 is said to lie"):
        source[0]
    cached.write_bytes(data[:100])
    assert same(source[0], sample(0)), "a wrong size is seen each time"


def test_each_shard_is_fetched_once_an_epoch_where_the_window_fits(tmp_path):
    write_mds(tmp_path / "d", samples=320, hashes=())
    source = MosaicShards(f"shaky:/{tmp_path}/d", cache=tmp_path / "cache", cache_bytes=12_000, window=5)
    shards = [8 * i for i in range(40)]
    assert all(same(source[i], sample(i)) for i in shards for _ in (0, 1))
    sizes = {f.name: f.stat().st_size for f in (tmp_path / "d").glob("*.mds")}
    assert {name: count for name, count in fetched(tmp_path / "d").items() if name in sizes} == sizes
    assert 8_000 < used(tmp_path / "cache") <= 12_000


@settings(max_examples=300)
@given(data=st.binary(max_size=60), sizes=st.lists(st.integers(0, 9), min_size=1, max_size=5))
def test_cutting_a_sample_gives_all_of_it_or_says_that_it_is_damaged(data, sizes):
    try:
        cells = cut(data, sizes)
    except Damaged:
        return
    assert sum(map(len, cells)) + 4 * sizes.count(0) == len(data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300)
@given(data=st.data())
def test_an_index_with_anything_in_it_is_read_or_refused(data, tmp_path_factory):
    folder = INDEX.setdefault("folder", None) or write_mds(tmp_path_factory.mktemp("fuzz"), samples=9)
    INDEX["folder"] = folder
    index = json.loads((folder / "index.json").read_text())
    entry = index["shards"][data.draw(st.integers(0, 1))]
    place = data.draw(st.sampled_from([*entry, "bytes", "basename", "whole"]))
    value = data.draw(JSON)
    if place == "whole":
        index = {"shards": value}
    else:
        (entry["raw_data"] if place in ("bytes", "basename") else entry)[place] = value
    try:
        for entry, layout in read_index(json.dumps(index).encode(), "fuzz"):
            assert entry["samples"] >= 0 and len(layout[0]) == len(layout[1]) == len(layout[2])
    except DataError:
        pass


INDEX: dict = {}


@settings(max_examples=200)
@given(at=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_flipped_bit_in_a_shard_without_hash_breaks_nothing_else(at, bit, tmp_path_factory):
    folder = INDEX.get("flips") or write_mds(tmp_path_factory.mktemp("flips"), samples=8, hashes=())
    INDEX["flips"] = folder
    shard = folder / "shard.00000.mds"
    whole = shard.read_bytes()
    broken = bytearray(whole)
    broken[at % len(whole)] ^= 1 << bit
    shard.write_bytes(broken)
    try:
        source = MosaicShards(folder)
        for i in range(8):
            try:
                assert source[i]["x"].shape == (50,)
            except DataError:
                continue
    finally:
        shard.write_bytes(whole)
