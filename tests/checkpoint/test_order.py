"""An order means the same to the process that carries it out as to the rank that gave it."""

from __future__ import annotations

import json
from datetime import timedelta

import numpy as np
from held import Held

from trainfleet.checkpoint import Retention
from trainfleet.checkpoint.catalog import examine
from trainfleet.checkpoint.memory import StagingMemory
from trainfleet.checkpoint.names import Attempt
from trainfleet.checkpoint.order import Order, carry_out
from trainfleet.checkpoint.staging import stage
from trainfleet.state import PerRank
from trainfleet.store import MemoryStore


def held():
    return Held(w=np.arange(6.0).reshape(2, 3), own=PerRank(np.arange(3)), x={"deep": [1, "two", None]})


def order(memory):
    return Order(
        attempt=Attempt(step=4, run="0123456789ab", number=2, world_size=1),
        rank=0,
        staged=stage({"m": held()}, memory, rank=0),
        metadata={"a": 1},
        metrics={"loss": 0.5},
        retention=Retention(last=2, best=1, mode="max"),
        timeout=timedelta(seconds=7),
    )


def test_it_survives_being_sent():
    memory = StagingMemory(shared=False)
    given = order(memory)
    got = Order.from_json(json.loads(json.dumps(given.to_json())), memory.reserve(memory.num_bytes))
    for name in ("attempt", "rank", "metadata", "metrics", "retention", "timeout", "export"):
        assert getattr(got, name) == getattr(given, name), name
    assert got.staged.state == given.staged.state
    for a, b in zip(got.staged.pieces, given.staged.pieces, strict=True):
        assert (a.path, a.dtype, a.region, a.start, a.per_rank) == (b.path, b.dtype, b.region, b.start, b.per_rank)
        assert (a.data == b.data).all()


def test_both_write_the_same_bytes():
    memory = StagingMemory(shared=False)
    given = order(memory)
    got = Order.from_json(json.loads(json.dumps(given.to_json())), memory.reserve(memory.num_bytes))
    here, there = MemoryStore(), MemoryStore()
    carry_out(here, given)
    carry_out(there, got)
    assert here.names() == there.names() and examine(here, 4).state == "whole"
    shards = [name for name in here.names() if "manifest" not in name]
    assert shards and all(here.get(name) == there.get(name) for name in shards)


def test_pieces_that_have_not_changed_need_not_be_sent_again():
    memory = StagingMemory(shared=False)
    first, second = order(memory), order(memory)
    assert first.staged.layout == second.staged.layout
    bytes_ = memory.reserve(memory.num_bytes)
    told = Order.from_json(json.loads(json.dumps(first.to_json())), bytes_)
    got = Order.from_json(json.loads(json.dumps(second.to_json(pieces=False))), bytes_, told)
    assert [p.path for p in got.staged.pieces] == [p.path for p in second.staged.pieces] != []
