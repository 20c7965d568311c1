"""What many ranks saved in pieces is seen as one process would have saved it."""

from __future__ import annotations

import numpy as np
import pytest
from held import Held

from trainfleet.checkpoint import Checkpointer
from trainfleet.checkpoint.manifest import read_indexes, read_manifest
from trainfleet.checkpoint.sealed import Damaged
from trainfleet.checkpoint.whole import Whole, whole_states
from trainfleet.comm.threads import run_ranks
from trainfleet.state import PerRank, ShardedArray
from trainfleet.store import MemoryStore

ROWS = np.arange(30.0, dtype=np.float32).reshape(10, 3)
COLUMNS = np.arange(24, dtype=np.int16).reshape(4, 6)


def cut(whole, dim, rank, size):
    places = np.array_split(np.arange(whole.shape[dim]), size)[rank]
    offsets = [0] * whole.ndim
    offsets[dim] = int(places[0]) if len(places) else 0
    local = np.take(whole, places, axis=dim)
    return ShardedArray(name="x", global_shape=whole.shape, offsets=tuple(offsets), local=local)


def saved(size):
    store = MemoryStore()

    def save(group):
        state = Held(
            rows=cut(ROWS, 0, group.rank, size),
            deep={"columns": cut(COLUMNS, 1, group.rank, size)},
            scalar=np.array(2.5, np.float32),
            empty=np.zeros((0, 3)),
            own=PerRank(np.full(2, group.rank)),
            words=("a", 1, None),
        )
        with Checkpointer(store, group=group) as checkpointer:
            checkpointer.save(3, m=state, other=Held(n=7))

    run_ranks(size, save)
    return store, read_indexes(store, read_manifest(store, 3))


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_pieces_are_joined_along_any_dimension(size):
    store, indexes = saved(size)
    found = whole_states(store, indexes)
    assert (found["m"]["rows"] == ROWS).all() and found["m"]["rows"].dtype == np.float32
    assert (found["m"]["deep"]["columns"] == COLUMNS).all()
    assert found["m"]["scalar"] == 2.5 and found["m"]["empty"].shape == (0, 3)
    assert (found["m"]["own"] == 0).all(), "of what is each rank's own, that of rank 0"
    assert found["m"]["words"] == ("a", 1, None) and found["other"] == {"n": 7}


def test_the_arrays_of_a_state_are_named_and_those_of_single_ranks_left_out():
    store, indexes = saved(2)
    with Whole(store, indexes) as whole:
        assert {array.path for array in whole.arrays("m")} == {"m/rows", "m/deep/columns", "m/scalar", "m/empty"}
        assert not list(whole.arrays("other")) and not list(whole.arrays("nobody"))


def test_a_flipped_bit_is_named():
    store, indexes = saved(2)
    name = indexes[1].data_name
    data = bytearray(store.get(name))
    data[indexes[1].pieces[0].begin] ^= 1
    store.put(name, bytes(data))
    with pytest.raises(Damaged, match=name):
        whole_states(store, indexes)
