from __future__ import annotations

import numpy as np
import pytest
from held import Held

from trainfleet.checkpoint.memory import StagingMemory
from trainfleet.checkpoint.regions import Region
from trainfleet.checkpoint.staging import stage
from trainfleet.errors import CheckpointError
from trainfleet.state import PerRank, ShardedArray


def piece(replica=0, length=3):
    local = np.arange(float(length))
    return ShardedArray(name="w", global_shape=(10,), offsets=(2,), local=local, replica=replica)


def staged(rank, **value):
    return stage({"m": Held(**value)}, StagingMemory(shared=False), rank=rank)


def test_rank_0_stages_what_is_whole_and_others_say_what_they_leave_to_it():
    assert [p.path for p in staged(0, x=np.ones(2)).pieces] == ["m/x"]
    assert staged(0, x=np.ones(2)).left_to_rank_0 == ()
    assert staged(1, x=np.ones(2)).pieces == ()
    assert staged(1, x=np.ones(2)).left_to_rank_0 == ("m/x",)


def test_every_rank_stages_its_pieces_but_of_copies_only_the_first():
    (found,) = staged(1, w=piece()).pieces
    assert found.region == Region((2,), (3,))
    assert found.data.view(np.float64).tolist() == [0, 1, 2]
    assert staged(1, w=piece(replica=1)).pieces == ()
    assert staged(1, w=piece(replica=1)).left_to_rank_0 == ()


def test_every_rank_stages_what_is_its_own():
    (found,) = staged(3, own=PerRank(np.ones(2))).pieces
    assert found.per_rank


def test_empty_pieces_take_no_place():
    assert staged(0, w=piece(length=0), e=np.zeros((0, 2))).pieces == ()


def test_what_is_staged_does_not_follow_the_array():
    array = np.zeros(4)
    found = staged(0, x=array)
    array += 1
    assert not found.pieces[0].data.any()


def test_the_memory_is_taken_once():
    memory = StagingMemory(shared=False)
    statefuls = {"m": Held(a=np.ones(100), b=np.ones(3, np.int8))}
    first = stage(statefuls, memory, rank=0)
    size = memory.num_bytes
    second = stage(statefuls, memory, rank=0)
    assert memory.num_bytes == size >= first.num_bytes == 803
    assert all(np.shares_memory(a.data, b.data) for a, b in zip(first.pieces, second.pieces))


def test_keys_that_look_alike_are_refused():
    with pytest.raises(CheckpointError, match="m/d/1"):
        staged(0, d={1: np.zeros(1), "1": np.zeros(1)})


@pytest.mark.parametrize(
    "other",
    [
        {"v": np.arange(6.0)},
        {"w": np.arange(6)},
        {"w": np.arange(6.0).reshape(2, 3)},
        {"w": PerRank(np.arange(6.0))},
        {"w": ShardedArray(name="w", global_shape=(9,), offsets=(1,), local=np.arange(6.0))},
    ],
)
def test_pieces_are_used_again_only_for_arrays_of_the_same_name_dtype_shape_and_place(other):
    memory = StagingMemory(shared=False)
    first = stage({"m": Held(w=np.arange(6.0))}, memory, rank=0)
    second = stage({"m": Held(w=np.arange(6.0) + 1)}, memory, rank=0)
    assert second.pieces is first.pieces and second.layout == first.layout
    assert (second.pieces[0].data.view(np.float64) == np.arange(6.0) + 1).all()
    third = stage({"m": Held(**other)}, memory, rank=0)
    (found,), (former,) = third.pieces, first.pieces
    assert third.layout != first.layout
    assert (found.path, found.dtype, found.region, found.per_rank) != (
        former.path,
        former.dtype,
        former.region,
        former.per_rank,
    )
