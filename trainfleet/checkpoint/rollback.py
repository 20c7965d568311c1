"""Rollback: a copy of states in memory, to go back some steps after an anomaly without reading a disk."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from trainfleet.checkpoint.arrays import is_array
from trainfleet.checkpoint.staging import state_of
from trainfleet.errors import CheckpointError
from trainfleet.state import PerRank, ShardedArray, Stateful, is_tensor


class Rollback:
    """The states of this rank as they were at one step. Every rank takes and restores at the same steps.

        rollback = Rollback(model=model, optimizer=optimizer)
        rollback.take(100)
        ...
        rollback.restore()    # as after step 100, to the bit

    It holds one copy of all arrays of this rank, replicas too, on the CPU.
    """

    def __init__(self, **statefuls: Stateful) -> None:
        self._statefuls = statefuls
        self._copies: dict[str, Any] = {}
        self.step: int | None = None
        """The step that `restore` goes back to; None before the first `take`."""

    def take(self, step: int) -> None:
        """Remember the states as they are now, in place of those before."""
        self.step = None  # should memory run out in the middle
        for name, stateful in self._statefuls.items():
            self._copies[name] = _copied(state_of(name, stateful), self._copies.get(name))
        self.step = step

    def restore(self) -> int:
        """Put the states back; the step they are of. CheckpointError if none was taken."""
        if self.step is None:
            raise CheckpointError("There is nothing to roll back to: `take` was not called, or did not finish.")
        for name, stateful in self._statefuls.items():
            stateful.load_state_dict(self._copies[name])
            # What was loaded may be used as it is, so the next restore must not give it out again.
            self._copies[name] = _copied(self._copies[name], None)
        return self.step


def _copied(value: Any, former: Any) -> Any:
    """A copy that shares nothing with `value`, in the memory of `former` where that is alike."""
    if isinstance(value, ShardedArray):
        return replace(value, local=_copied(value.local, former.local if isinstance(former, ShardedArray) else None))
    if isinstance(value, PerRank):
        return PerRank(_copied(value.value, former.value if isinstance(former, PerRank) else None))
    if is_array(value):
        return _copied_array(value, former)
    if isinstance(value, Mapping):
        below = former if isinstance(former, Mapping) else {}
        return {key: _copied(item, below.get(key)) for key, item in value.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        listed = former if isinstance(former, list | tuple) and len(former) == len(value) else [None] * len(value)
        return type(value)(_copied(item, other) for item, other in zip(value, listed))
    return copy.deepcopy(value)


def _copied_array(array: Any, former: Any) -> Any:
    if not is_tensor(array):
        return array.copy()
    if is_tensor(former) and former.shape == array.shape and former.dtype == array.dtype:
        return former.copy_(array)
    return array.detach().to("cpu", copy=True)
