"""What is imported is a checkpoint like any other: verified, restored at any cut, committed wholly or not at all."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from held import Held

from trainfleet.checkpoint import Checkpointer
from trainfleet.checkpoint.foreign.into_store import import_arrays
from trainfleet.checkpoint.foreign.pieces import ForeignArray, ForeignPiece, whole_array
from trainfleet.checkpoint.regions import Region
from trainfleet.comm.threads import run_ranks
from trainfleet.errors import CheckpointError, StoreError
from trainfleet.state import ShardedArray
from trainfleet.store import FileStore, MemoryStore

WHOLE = np.arange(12, dtype="<f4").reshape(4, 3)


def raw(array):
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def arrays(scale=1):
    left, right = raw(WHOLE[:, :1] * np.float32(scale)), raw(WHOLE[:, 1:] * np.float32(scale))
    pieces = ForeignPiece(Region((0, 0), (4, 1)), lambda: left), ForeignPiece(Region((0, 1), (4, 2)), lambda: right)
    return (
        ForeignArray(name="layer.w/odd~", dtype="float32", shape=(4, 3), pieces=pieces),
        whole_array("$n", "int64", (), lambda: raw(np.array(7))),
        whole_array("none", "float32", (0, 2), lambda: pytest.fail("read")),
    )


def test_it_restores_at_any_number_of_ranks():
    store = MemoryStore()
    import_arrays(store, arrays(), step=5, metadata={"from": "x"})

    def restore(group):
        rows = np.array_split(np.arange(4), group.size)[group.rank]
        local = np.zeros((len(rows), 3), "f4")
        piece = ShardedArray(name="w", global_shape=(4, 3), offsets=(int(rows[0]), 0), local=local)
        model = Held(**{"layer.w/odd~": piece, "$n": np.array(0), "none": np.zeros((0, 2), "f4")})
        checkpointer = Checkpointer(store, group=group)
        assert checkpointer.restore(model=model, partial=True) == 5
        assert (model.value["layer.w/odd~"].local == WHOLE[rows]).all() and model.value["$n"] == 7
        return checkpointer.read_metadata(5), checkpointer.verify(5)

    for size in (1, 3):
        assert run_ranks(size, restore)[0] == ({"from": "x"}, [])


def test_another_checkpoint_is_replaced_only_when_asked_for_and_others_stay():
    store = MemoryStore()
    for step in range(5):
        import_arrays(store, arrays(), step=step)
    with pytest.raises(CheckpointError, match="step-00000002 exists already"):
        import_arrays(store, arrays(2), step=2)
    import_arrays(store, arrays(2), step=2, replace=True)
    checkpointer = Checkpointer(store)
    assert checkpointer.steps() == [0, 1, 2, 3, 4]
    model = Held(**{"layer.w/odd~": np.zeros((4, 3), "f4"), "$n": np.array(0), "none": np.zeros((0, 2), "f4")})
    assert checkpointer.restore(model=model) == 2
    assert (model.value["layer.w/odd~"] == WHOLE * 2).all() and checkpointer.verify(2) == []


@pytest.mark.parametrize("reads", [lambda: raw(np.zeros(3, "f4")), lambda: (_ for _ in ()).throw(CheckpointError("x"))])
def test_an_import_that_fails_leaves_what_was_there(reads):
    store = MemoryStore()
    import_arrays(store, arrays())
    before = {name: store.get(name) for name in store.names()}
    with pytest.raises(CheckpointError, match=r"has 12 bytes where 16 were announced|x"):
        import_arrays(store, (*arrays(2), whole_array("late", "float32", (4,), reads)), replace=True)
    assert {name: store.get(name) for name in store.names()} == before


def test_a_store_in_use_is_left_alone():
    store = MemoryStore()
    hold = store.hold()
    try:
        with pytest.raises(StoreError, match="is in use"):
            import_arrays(store, arrays())
    finally:
        hold.close()


def test_memory_is_that_of_one_piece(tmp_path):
    def read():
        return np.zeros(4_000_000, np.uint8)

    many = tuple(whole_array(f"w{i}", "float32", (1_000_000,), read) for i in range(20))
    told = []
    tracemalloc.start()
    import_arrays(FileStore(tmp_path), many, tell=told.append)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(told) == 80_000_000 and peak < 10_000_000
