"""A restore takes another dtype or precision only by an explicit word."""

from __future__ import annotations

import numpy as np
import pytest
from held import Held

from trainfleet.checkpoint import Checkpointer
from trainfleet.checkpoint.restore import surplus_files
from trainfleet.comm.threads import run_ranks
from trainfleet.errors import CheckpointError, StoreError
from trainfleet.state import Setting, ShardedArray
from trainfleet.store import MemoryStore


def saved(**value):
    store = MemoryStore()
    with Checkpointer(store) as checkpointer:
        checkpointer.save(1, m=Held(**value)).wait()
    return store


def piece(dtype):
    return ShardedArray(name="w", global_shape=(3,), offsets=(0,), local=np.zeros(3, dtype))


def test_another_float_is_taken_by_the_word_alone():
    store = saved(w=ShardedArray(name="w", global_shape=(3,), offsets=(0,), local=np.array([1, 1e-9, 70000.0])))
    live = Held(w=piece(np.float16))
    with pytest.raises(CheckpointError, match=r"m/w has dtype float64 .* and float16 here; .*checkpoint.cast=true"):
        Checkpointer(store).restore(m=live)
    assert not live.value["w"].local.any()
    assert Checkpointer(store).restore(m=live, cast=True) == 1
    assert live.value["w"].local.tolist() == [1.0, 0.0, np.inf]


def test_a_float_is_never_taken_for_an_integer():
    live = Held(w=piece(np.int64))
    with pytest.raises(CheckpointError, match="has dtype float64 in the checkpoint and int64 here"):
        Checkpointer(saved(w=np.zeros(3))).restore(m=live, cast=True)


def test_a_setting_must_be_equal_or_overruled():
    store = saved(mode=Setting("fp16"), n=1)
    live = Held(mode=Setting("bf16"), n=0)
    with pytest.raises(CheckpointError, match=r"m/mode is 'fp16' in the checkpoint and 'bf16' here"):
        Checkpointer(store).restore(m=live)
    assert Checkpointer(store).restore(m=live, cast=True) == 1
    assert live.value == {"mode": Setting("bf16"), "n": 1}
    assert Checkpointer(store).restore(m=Held(mode=Setting("fp16"), n=0)) == 1


def test_reset_removes_every_checkpoint_and_nothing_else():
    store = saved(n=1)
    store.put("notes", b"mine")
    with Checkpointer(store) as checkpointer:
        checkpointer.save(2, m=Held(n=2)).wait()
        checkpointer.reset()
        assert not checkpointer.has_checkpoint() and store.names() == ["notes"]
        checkpointer.save(3, m=Held(n=3)).wait()
    assert Checkpointer(store).restore(m=Held(n=0)) == 3


def test_all_ranks_hear_that_nothing_could_be_removed():
    class Stuck(MemoryStore):
        def delete(self, name):
            raise StoreError("Cannot delete: permission is denied.")

    store = Stuck()

    def reset(group):
        with Checkpointer(store, group=group) as checkpointer:
            checkpointer.save(1, m=Held(n=1)).wait()
            with pytest.raises(CheckpointError, match="could not be removed: Cannot delete"):
                checkpointer.reset()
            return checkpointer.steps()

    assert run_ranks(2, reset) == [[1], [1]]


def test_what_does_not_belong_is_told_apart():
    store = saved(n=1)
    store.put("step-00000001/notes.txt", b"mine")
    assert surplus_files(store, 1) == ["step-00000001/notes.txt"]
