"""The way back is bounded."""

from __future__ import annotations

from typing import Any

import pytest

from trainfleet.errors import TrainfleetError
from trainfleet.training.rollbacks import Rollbacks


class Counter:
    n = 0

    def state_dict(self) -> dict[str, Any]:
        return {"n": self.n}

    def load_state_dict(self, state: Any, /) -> None:
        self.n = state["n"]


def test_states_go_back_to_the_last_copy() -> None:
    counter = Counter()
    rollbacks = Rollbacks({"counter": counter}, most=2)
    counter.n = 4
    rollbacks.remember(4)
    counter.n = 9
    assert rollbacks.go_back(9, "The loss is nan") == 4 and counter.n == 4


def test_rollbacks_that_bring_no_progress_end_the_run() -> None:
    rollbacks = Rollbacks({"counter": Counter()}, most=2)
    rollbacks.remember(0)
    assert [rollbacks.go_back(step, "x") for step in (5, 5, 9, 7)] == [0] * 4
    with pytest.raises(TrainfleetError, match="The loss is nan in step 9, and 2 rollbacks have brought"):
        rollbacks.go_back(9, "The loss is nan")
