"""A failed save is told and does not stop the run; where it was the last one, all ranks say so."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from held import Held

from trainfleet.checkpoint import Checkpointer
from trainfleet.comm.group import Group
from trainfleet.comm.threads import run_ranks
from trainfleet.errors import NotSaved, StoreError
from trainfleet.events import CheckpointFailed, CheckpointSaved, Event, Restored
from trainfleet.store import MemoryStore
from trainfleet.training.saves import Saves


class Full(MemoryStore):
    """Takes nothing where it is full."""

    is_full = False

    def put(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_full:
            raise StoreError("The disk is full.", hint="Make room.")
        return super().put(*args, **kwargs)


def saves_in(store: MemoryStore) -> tuple[Saves, list[Event], dict[str, Held]]:
    told: list[Event] = []
    saves = Saves(Checkpointer(store), emit=told.append, metadata={})
    return saves, told, {"m": Held(w=np.ones(2))}


def test_saves_are_told_when_they_have_ended() -> None:
    saves, told, states = saves_in(MemoryStore())
    saves.prepare(states)
    saves.save(3, states, {"loss": 1.0})
    saves.save_last(5, states, {})
    saves.save_last(5, states, {})
    assert [event.step for event in told if isinstance(event, CheckpointSaved)] == [3, 5]
    assert saves.checkpointer.steps() == [3, 5]


def test_what_was_saved_last_is_restored() -> None:
    store = MemoryStore()
    saves, _, states = saves_in(store)
    assert saves.restore(states, cast=False) is None
    saves.save_last(3, states, {})
    saves.checkpointer.close()
    anew, told, states = saves_in(store)
    assert anew.restore(states, cast=False) == anew.step == 3
    assert [event.step for event in told if isinstance(event, Restored)] == [3]
    anew.reset()
    assert anew.step is None and anew.checkpointer.steps() == []


def test_all_ranks_hear_what_one_could_not_save() -> None:
    def end(group: Group) -> tuple[str | None, int]:
        store = Full()
        saves, told, states = saves_in(store)
        saves.save(3, states, {})
        saves.tell()
        store.is_full = group.rank == 1
        saves.save_last(5, states, {})
        assert any(isinstance(event, CheckpointFailed) for event in told) == store.is_full
        newest = 3 if group.rank == 1 else 5
        with pytest.raises(NotSaved, match=rf"after step 5, but .*full.* of step {newest}") as refused:
            saves.refuse_unsaved_end(group, 5)
        return refused.value.hint, refused.value.exit_code

    assert [code for _, code in run_ranks(2, end)] == [15] * 2


def test_nothing_is_said_where_all_is_saved() -> None:
    run_ranks(2, lambda group: saves_in(MemoryStore())[0].refuse_unsaved_end(group, 5))


def test_a_store_that_has_vanished_does_not_hide_the_reason() -> None:
    class Gone(Full):
        is_gone = False

        def names(self, prefix: str = "") -> Any:
            if self.is_gone:
                raise StoreError("The folder vanished.")
            return super().names(prefix)

    def end(group: Group) -> None:
        store = Gone()
        saves, _, states = saves_in(store)
        store.is_full = True
        saves.save_last(5, states, {})
        store.is_gone = True
        with pytest.raises(NotSaved, match=r"full.* cannot be seen: The folder vanished"):
            saves.refuse_unsaved_end(group, 5)

    run_ranks(1, end)
