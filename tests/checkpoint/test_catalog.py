"""What stands in a store is listed as it is: whole, unfinished or damaged; a place is found by what people name."""

from __future__ import annotations

import numpy as np
import pytest

from trainfleet.checkpoint import Checkpointer, Retention
from trainfleet.checkpoint.catalog import catalog, examine, open_place, read_step
from trainfleet.checkpoint.sealed import seal
from trainfleet.errors import CheckpointError, NotStored
from trainfleet.store import FileStore, MemoryStore


class Held:
    def state_dict(self):
        return {"w": np.arange(1000.0)}

    def load_state_dict(self, state): ...


def saved(store, *steps):
    with Checkpointer(store, retention=Retention(last=99)) as checkpointer:
        for step in steps:
            checkpointer.save(step, metadata={"a": step}, metrics={"loss": 1 / step}, m=Held()).wait()
    return store


def test_a_whole_one_is_described_without_its_arrays():
    (entry,) = catalog(saved(MemoryStore(), 4))
    assert (entry.step, entry.order, entry.world_size, entry.problem) == (4, 1, 1, None)
    assert entry.num_bytes > 8000 and entry.metrics == {"loss": 0.25} and entry.metadata == {"a": 4}
    assert entry.saved_at > 1.7e9


def test_unfinished_and_damaged_ones_are_listed_with_their_reason():
    store = saved(MemoryStore(), 1, 2, 3, 4)
    store.delete("step-00000001/manifest.json")
    store.put("step-00000002/manifest.json", b"{}")
    store.delete(next(name for name in store.names("step-00000003/") if name.endswith(".safetensors")))
    problems = [entry.problem for entry in catalog(store)]
    assert "not finished" in problems[0] and "do not match the digest" in problems[1]
    assert "safetensors: missing" in problems[2] and problems[3] is None


def test_the_newest_commit_is_taken_and_not_the_highest_step():
    store = saved(MemoryStore(), 30, 10)
    assert read_step(store, None)[0].step == 10 and read_step(store, 30)[0].step == 30
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 5 .*steps are 10, 30"):
        read_step(store, 5)
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        read_step(MemoryStore(), None)


def test_a_place_is_a_run_a_folder_of_checkpoints_or_one_step(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    saved(FileStore(folder), 7)
    for place, step in ((tmp_path / "run", None), (folder, None), (folder / "step-00000007", 7)):
        store, named = open_place(str(place))
        assert store.folder == folder and named == step
    assert open_place(folder.as_uri())[0].folder == folder
    with pytest.raises(CheckpointError, match=f"{tmp_path / 'nowhere'} does not exist"):
        open_place(str(tmp_path / "nowhere"))
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file, not a folder"):
        open_place(str(tmp_path / "file"))


def test_a_place_without_checkpoints_is_not_searched_to_its_depths(tmp_path):
    saved(FileStore(tmp_path / "deep" / "run" / "checkpoints"), 7)
    with pytest.raises(CheckpointError, match="no checkpoints in"):
        open_place(str(tmp_path / "deep"))


def test_every_byte_is_examined_and_the_verdict_is_in_words():
    store = saved(MemoryStore(), 1, 2, 3, 4)
    read = []
    assert examine(store, 1, read.append).state == "whole" and sum(read) == 8000
    store.put("step-00000001/note.txt", b"mine")
    assert examine(store, 1).surplus == ("step-00000001/note.txt",)
    name = next(name for name in store.names("step-00000002/") if name.endswith(".safetensors"))
    data = bytearray(store.get(name))
    data[-5] ^= 1
    store.put(name, bytes(data))
    verdict = examine(store, 2)
    assert verdict.state == "damaged" and verdict.problems == (f"{name}: m/w does not match its digest",)
    store.delete("step-00000003/manifest.json")
    assert examine(store, 3).state == "unfinished"
    store.put("step-00000003/manifest.json", b"{}")
    assert examine(store, 3).state == "damaged"
    store.put("step-00000004/manifest.json", seal("manifest", {"format": 99}))
    verdict = examine(store, 4)
    assert verdict.state == "unreadable" and "newer one" in verdict.problems[0]


def test_one_that_is_removed_while_it_is_read_is_no_damage():
    store = saved(MemoryStore(), 1)

    class Pruned(MemoryStore):
        def open(self, name):
            store.delete("step-00000001/manifest.json")
            raise NotStored(name)

    pruned = Pruned()
    pruned._held = store._held
    assert examine(pruned, 1).state == "unfinished"
