"""Rank 0 publishes a whole or nothing."""

from __future__ import annotations

import json
from datetime import timedelta

import numpy as np
import pytest
from held import Held

from trainfleet.checkpoint import Checkpointer
from trainfleet.checkpoint.sealed import seal
from trainfleet.comm.threads import run_ranks
from trainfleet.errors import CheckpointError
from trainfleet.state import ShardedArray
from trainfleet.store import MemoryStore

SHORT = timedelta(seconds=20)


def pieces_of(whole, rank, size):
    """This rank's rows of `whole`, cut unevenly."""
    cuts = [0, *(len(whole) * (r + 1) // size for r in range(size))]
    local = whole[cuts[rank] : cuts[rank + 1]].copy()
    return ShardedArray(
        name="w", global_shape=whole.shape, offsets=(cuts[rank],) + (0,) * (whole.ndim - 1), local=local
    )


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (lambda r: {"w": ShardedArray(name="w", global_shape=(4,), offsets=(r,), local=np.zeros(1))}, "leave a hole"),
        (
            lambda r: {"w": ShardedArray(name="w", global_shape=(4,), offsets=(0,), local=np.zeros(4))},
            "Ranks 0 and 1",
        ),
        (lambda r: {"w": np.zeros(3)} if r else {}, r"ranks \[1\] that rank 0 does not have"),
        (lambda r: {"w": pieces_of(np.zeros((4, 1 + r)), r, 2)}, "must be one array"),
        (lambda r: {"w": pieces_of(np.zeros(4, [np.float32, np.float64][r]), r, 2)}, "must be one array"),
    ],
)
def test_pieces_that_make_no_whole_are_never_committed(state, words):
    store = MemoryStore()

    def save(group):
        checkpointer = Checkpointer(store, group=group, timeout=SHORT)
        save = checkpointer.save(1, m=Held(**state(group.rank)))
        save.settle()
        return save.error

    errors = run_ranks(2, save)
    with pytest.raises(CheckpointError, match=words):
        raise errors[0]
    assert not Checkpointer(store).has_checkpoint()
    assert store.names() == []


def test_rank_0_names_the_ranks_whose_shards_do_not_come():
    store = MemoryStore()

    def save(group):
        checkpointer = Checkpointer(
            store if group.rank == 0 else MemoryStore(), group=group, timeout=timedelta(seconds=0.2)
        )
        save = checkpointer.save(1, m=Held(x=1))
        save.settle()
        return str(save.error)

    zero, one = run_ranks(2, save)
    assert "shards of ranks [1]" in zero
    assert one == "None"
    assert store.names() == []


def test_the_manifest_is_readable_json():
    store = MemoryStore()
    Checkpointer(store).save(1, m=Held(x=1)).wait()
    manifest = json.loads(store.get("step-00000001/manifest.json"))
    assert manifest["format"] == 1
    assert manifest["step"] == 1
    assert manifest["world_size"] == 1


def test_a_newer_format_is_not_passed_over():
    store = MemoryStore()
    Checkpointer(store).save(1, m=Held(x=1)).wait()
    store.put("step-00000002/manifest.json", seal("manifest", {"format": 99}))
    with pytest.raises(CheckpointError, match=r"format 99.*newer"):
        Checkpointer(store).restore(m=Held(x=0))
