"""WebDatasets are read as they were written, counted once, and a broken one is named."""

from __future__ import annotations

import json
import pickle
import random

import numpy as np
import pytest
from data.shards.made import NAMES, fetched, same, sample, tar_files, tarred, used, write_tars

from trainfleet.data import LocalBatches
from trainfleet.data.shards.tar import TarShards
from trainfleet.data.source import open_source
from trainfleet.errors import DataError


def source(tmp_path, url=None, **how):
    if url is None:
        url = f"shaky:/{write_tars(tmp_path / 'd')}/train-{{000..007}}.tar"
    return TarShards(url, **{"columns": NAMES, "cache": tmp_path / "cache"} | how)


@pytest.mark.parametrize("ending", [".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.zst"])
@pytest.mark.parametrize("scheme", ["", "shaky:/"])
def test_samples_are_those_that_were_written(tmp_path, ending, scheme):
    folder = write_tars(tmp_path / "d", ending=ending)
    url = f"{scheme}{folder}/train-{{000..007}}{ending}"
    ours = open_source("webdataset", url=url, columns=NAMES, cache=tmp_path / "cache")
    assert len(ours) == 60 and ours.blocks.sizes == (8,) * 7 + (4,)
    assert all(same(ours[i], sample(i)) for i in random.Random(1).sample(range(60), 60))


def test_without_columns_all_files_come_by_their_ending_and_the_key_if_asked(tmp_path):
    ours = source(tmp_path, columns=None, key="key")
    assert ours[9].keys() == {"i.cls", "x.npy", "note.txt", "key"} and ours[9]["key"] == "some/00009"
    assert source(tmp_path, columns=["i.cls"])[9] == {"i.cls": 9}
    assert source(tmp_path, columns={"n": "no;i.cls;note.txt"})[9] == {"n": 9}
    with pytest.raises(DataError, match=r"some/00009 has no jpg;png, but i.cls, note.txt, x.npy"):
        source(tmp_path, columns={"input": "jpg;png"})[9]


def test_shards_are_counted_once_for_all_who_use_the_cache(tmp_path):
    source(tmp_path)
    before = fetched(tmp_path / "d")
    assert sum(before.values()) == sum(f.stat().st_size for f in (tmp_path / "d").glob("*.tar"))
    again = source(tmp_path)
    assert same(again[59], sample(59)) and fetched(tmp_path / "d") == before
    for file in (tmp_path / "cache" / "index").iterdir():
        file.write_text("garbled")
    assert same(source(tmp_path)[59], sample(59)), "looked up again"


def test_an_index_saves_looking(tmp_path):
    folder = write_tars(tmp_path / "d")
    shards = [{"url": f"train-{n:03}.tar", "nsamples": 8 if n < 7 else 4} for n in range(8)]
    (folder / "index.json").write_text(json.dumps({"shardlist": shards}))
    ours = source(tmp_path, f"shaky:/{folder}/index.json")
    assert len(ours) == 60 and set(fetched(folder)) == {"index.json"}
    assert same(ours[8], sample(8)) and set(fetched(folder)) == {"index.json", "train-001.tar"}
    shards[1]["nsamples"] = 7
    (folder / "index.json").write_text(json.dumps({"shardlist": shards}))
    with pytest.raises(DataError, match=r"train-001.tar is damaged.*has 8 samples, and 7 by its index"):
        source(tmp_path, f"shaky:/{folder}/index.json")[8]


def test_a_shard_that_is_cut_off_is_named_and_never_kept(tmp_path):
    folder = write_tars(tmp_path / "d")
    shard = folder / "train-003.tar"
    shard.write_bytes(shard.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"train-003.tar is damaged: it is cut off"):
        source(tmp_path, f"shaky:/{folder}/train-{{000..007}}.tar")
    with pytest.raises(DataError, match=r"train-003.tar is damaged: it is cut off"):
        source(tmp_path, folder)
    assert not [f for f in (tmp_path / "cache").iterdir() if "train-003" in f.name]


def test_a_shard_that_was_written_anew_is_noticed_or_read_right(tmp_path):
    ours = source(tmp_path, cache_bytes=10**6)
    anew = {}
    for i in (8, 10, 9, 11, 12, 13, 14, 15):  # of the same size, in another order
        anew |= tar_files(i)
    (tmp_path / "d" / "train-001.tar").write_bytes(tarred(anew))
    for file in (tmp_path / "cache").glob("*.tar"):
        file.unlink()
    assert same(source(tmp_path, f"shaky:/{tmp_path}/d/train-{{000..007}}.tar")[9], sample(10))
    (tmp_path / "d" / "train-002.tar").write_bytes(tarred(tar_files(16)))
    with pytest.raises(DataError, match=r"train-002.tar is damaged.*bytes, and should have"):
        ours[16]


def test_broken_files_in_a_shard_are_named_with_their_sample(tmp_path):
    (tmp_path / "a.tar").write_bytes(
        tarred({"s1.jpg": b"no image", "s2.cls": b"seven", "s3.npy": b"x", "s4.txt": b"ok"})
    )
    ours = source(tmp_path, tmp_path / "a.tar", columns=None)
    for row, words in enumerate([r"s1.jpg: cannot identify", r"s2.cls: it is no number", r"s3.npy: .* without pickle"]):
        with pytest.raises(DataError, match=words):
            ours[row]
    assert ours[3] == {"txt": "ok"}


def test_batches_are_the_same_with_workers_and_a_small_cache(tmp_path):
    write_tars(tmp_path / "d", samples=120)
    url = f"shaky:/{tmp_path}/d/train-{{000..014}}.tar"
    size = (tmp_path / "d" / "train-000.tar").stat().st_size
    plain = LocalBatches(source(tmp_path, tmp_path / "d", window=3), size=8, seed=2, epochs=1, collate="numpy")
    for workers in (0, 3):
        ours = source(tmp_path, url, cache_bytes=7 * size, window=3, cache=tmp_path / "small")
        with LocalBatches(ours, size=8, seed=2, epochs=1, workers=workers, collate="numpy") as stream:
            found = list(stream)
        if not workers:
            wanted = list(plain)
            assert sorted(int(i) for b in wanted for i in b["i"]) == list(range(120))
        assert all(same(*pair) for pair in zip(found, wanted)) and len(found) == 15
        assert used(tmp_path / "small") <= 7 * size


def test_it_can_be_sent_to_another_process(tmp_path):
    ours = source(tmp_path)
    assert same(ours[3], sample(3))
    assert same(pickle.loads(pickle.dumps(ours))[3], sample(3))


def test_images_are_pixels(tmp_path):
    from data.shards.test_encodings import picture

    (tmp_path / "a.tar").write_bytes(tarred({"1.png": picture("PNG"), "1.cls": b"3"}))
    ours = source(tmp_path, tmp_path / "a.tar", columns={"input": "jpg;png", "target": "cls"})
    assert ours[0]["input"].tolist() == np.arange(60).reshape(4, 5, 3).transpose(2, 0, 1).tolist()
    assert ours[0]["input"].dtype == np.uint8 and ours[0]["target"] == 3
