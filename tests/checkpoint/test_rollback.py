"""A rollback puts states back to the bit, as often as one likes, and shares nothing with them."""

from __future__ import annotations

import numpy as np
import pytest

from trainfleet.checkpoint import Rollback
from trainfleet.errors import CheckpointError
from trainfleet.state import PerRank, ShardedArray


class Live:
    def __init__(self):
        self.state = {
            "w": np.arange(4.0),
            "piece": ShardedArray(name="p", global_shape=(4,), offsets=(2,), local=np.ones(2), replica=1),
            "own": PerRank({"words": np.arange(3)}),
            "list": [1, (2, np.zeros(2))],
            "n": 0,
        }

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = dict(state)

    def spoil(self):
        self.state["w"] += 1
        self.state["piece"].local[:] = -1
        self.state["own"].value["words"][:] = 9
        self.state["list"][1][1][:] = 5
        self.state["n"] += 1

    def is_fresh(self):
        s = self.state
        return bool(
            (s["w"] == np.arange(4.0)).all()
            and (s["piece"].local == 1).all()
            and s["piece"].replica == 1
            and (s["own"].value["words"] == np.arange(3)).all()
            and (s["list"][1][1] == 0).all()
            and s["n"] == 0
        )


def test_states_come_back_as_often_as_they_are_spoilt():
    live = Live()
    rollback = Rollback(live=live)
    rollback.take(7)
    for _ in range(3):
        live.spoil()
        assert not live.is_fresh()
        assert rollback.restore() == 7
        assert live.is_fresh()


def test_a_later_copy_takes_the_place_of_an_earlier_one():
    live = Live()
    rollback = Rollback(live=live)
    rollback.take(1)
    live.spoil()
    rollback.take(2)
    live.spoil()
    assert rollback.restore() == 2 and live.state["n"] == 1 and (live.state["w"] == np.arange(4.0) + 1).all()


def test_without_a_copy_there_is_no_way_back():
    with pytest.raises(CheckpointError, match="nothing to roll back to"):
        Rollback(live=Live()).restore()


def test_tensors_keep_their_memory():
    torch = pytest.importorskip("torch", reason="torch is not installed")

    class Tensors:
        w = torch.arange(4.0)

        def state_dict(self):
            return {"w": self.w}

        def load_state_dict(self, state):
            self.w.copy_(state["w"])

    live = Tensors()
    rollback = Rollback(live=live)
    rollback.take(0)
    live.w += 1
    rollback.take(1)
    live.w.zero_()
    rollback.restore()
    assert torch.equal(live.w, torch.arange(4.0) + 1)
