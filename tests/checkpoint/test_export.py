"""An export is a safetensors file of whole arrays that others load."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from held import Held

from trainfleet.checkpoint import Checkpointer
from trainfleet.checkpoint.export import safetensors_of
from trainfleet.checkpoint.manifest import read_indexes, read_manifest
from trainfleet.checkpoint.sealed import Damaged
from trainfleet.comm.threads import run_ranks
from trainfleet.errors import CheckpointError
from trainfleet.state import ShardedArray
from trainfleet.store import FileStore, MemoryStore

safetensors = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")

WEIGHT = np.random.default_rng(0).standard_normal((7, 5)).astype(np.float32)


def saved(store, size=2, **more):
    def save(group):
        rows = np.array_split(np.arange(7), size)[group.rank]
        piece = ShardedArray(name="w", global_shape=(7, 5), offsets=(int(rows[0]), 0), local=WEIGHT[rows])
        model = Held(**{"a.weight": piece, "a/odd~name": np.arange(3), "flag": np.array(True), "extra": "text", **more})
        with Checkpointer(store, group=group) as checkpointer:
            checkpointer.save(1, model=model, other=Held(n=1))

    run_ranks(size, save)
    return read_indexes(store, read_manifest(store, 1))


def exported(store, indexes, **choice):
    return b"".join(bytes(chunk) for chunk in safetensors_of(store, indexes, **choice))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_whole_arrays_load_by_their_names(size):
    store = MemoryStore()
    found = safetensors.load(exported(store, saved(store, size)))
    assert set(found) == {"a.weight", "a/odd~name", "flag"}
    assert (found["a.weight"] == WEIGHT).all() and (found["a/odd~name"] == np.arange(3)).all() and found["flag"]


def test_floats_are_rounded_and_others_are_not():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from safetensors.torch import load

    store = MemoryStore()
    found = load(exported(store, saved(store), dtype="bfloat16"))
    assert torch.equal(found["a.weight"], torch.from_numpy(WEIGHT).bfloat16())
    assert found["a/odd~name"].dtype == torch.int64 and found["flag"].dtype == torch.bool


def test_a_state_without_arrays_is_refused():
    store = MemoryStore()
    indexes = saved(store)
    for state in ("other", "nobody"):
        with pytest.raises(CheckpointError, match=f"no state '{state}' with arrays .*holds model, other"):
            exported(store, indexes, state=state)


def test_a_damaged_piece_is_never_exported():
    store = MemoryStore()
    indexes = saved(store)
    name = indexes[0].data_name
    data = bytearray(store.get(name))
    data[indexes[0].pieces[0].begin] ^= 4
    store.put(name, bytes(data))
    with pytest.raises(Damaged, match=name):
        exported(store, indexes)


def test_memory_is_that_of_one_array_and_not_of_the_model(tmp_path):
    store = FileStore(tmp_path)
    arrays = {f"layer{i}": np.full(250_000, float(i)) for i in range(20)}  # 2 MB each
    indexes = saved(store, 1, **arrays)
    del arrays
    tracemalloc.start()
    total = sum(len(chunk) for chunk in safetensors_of(store, indexes))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total > 40_000_000 and peak < 6_000_000


def test_each_checkpoint_can_hold_an_export(tmp_path):
    store = FileStore(tmp_path)
    with Checkpointer(store, export="bf16") as checkpointer:
        checkpointer.save(1, model=Held(w=WEIGHT)).wait()
        assert checkpointer.verify(1) == []
    (file,) = (tmp_path / "step-00000001").glob("*-with-model.safetensors")
    assert b"BF16" in file.read_bytes()[:200]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert checkpointer.verify(1) == [f"step-00000001/{file.name}: does not match its digest in the manifest"]
    file.unlink()
    assert checkpointer.verify(1) == [f"step-00000001/{file.name}: missing"]
