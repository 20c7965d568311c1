"""How saves end, well and badly, and who hears of it."""

from __future__ import annotations

import logging
import threading
import time
from datetime import timedelta

import numpy as np
import pytest
from held import Held

from trainfleet.checkpoint import Checkpointer, Save
from trainfleet.comm.threads import run_ranks
from trainfleet.errors import CheckpointError, StoreError
from trainfleet.store import MemoryStore

SHORT = timedelta(seconds=20)


class Broken(MemoryStore):
    """A store that takes nothing whose name ends with `suffix`."""

    def __init__(self, suffix):
        super().__init__()
        self.suffix = suffix
        self.is_broken = True

    def put(self, name, data):
        if self.is_broken and name.endswith(self.suffix):
            b"".join([data] if isinstance(data, bytes) else data)
            raise StoreError("Cannot store: the disk is full.", hint="Free some room.")
        return super().put(name, data)


@pytest.mark.parametrize("suffix", [".safetensors", "-of-00001.json", "manifest.json"])
def test_a_failed_save_says_why_leaves_the_old_ones_and_nothing_of_its_own(suffix):
    store = Broken(suffix)
    store.is_broken = False
    checkpointer = Checkpointer(store)
    checkpointer.save(1, m=Held(x=1)).wait()
    before = store.names()
    store.is_broken = True
    save = checkpointer.save(2, m=Held(x=2))
    with pytest.raises(CheckpointError, match=r"Step 2 was not saved: .*full") as caught:
        save.wait()
    assert caught.value.hint == "Free some room."
    assert save.done
    assert save.error is caught.value
    assert store.names() == before
    live = Held(x=0)
    assert checkpointer.restore(m=live) == 1
    store.is_broken = False
    checkpointer.save(3, m=Held(x=3)).wait()
    assert checkpointer.steps() == [1, 3]


def test_a_failure_nobody_asked_about_is_logged_at_the_next_save_and_raised_at_close(caplog):
    store = Broken("manifest.json")
    checkpointer = Checkpointer(store)
    checkpointer.save(1, m=Held(x=1)).settle()
    with caplog.at_level(logging.ERROR):
        checkpointer.save(2, m=Held(x=2))
    assert "Step 1 was not saved" in caplog.text
    with pytest.raises(CheckpointError, match="Step 2"):
        checkpointer.close()
    checkpointer.close()


def test_rank_0_hears_why_another_rank_failed_and_does_not_wait_for_it():
    store = Broken("-00001-of-00002.safetensors")

    def save(group):
        checkpointer = Checkpointer(store, group=group, timeout=timedelta(minutes=5))
        save = checkpointer.save(1, m=Held(x=1))
        save.settle()
        return str(save.error)

    zero, one = run_ranks(2, save)
    assert "disk is full" in one
    assert "rank 1 failed" in zero
    assert "disk is full" in zero
    assert store.names() == []


def test_rank_0_hears_of_a_state_that_another_rank_cannot_store():
    store = MemoryStore()

    def save(group):
        checkpointer = Checkpointer(store, group=group, timeout=timedelta(minutes=5))
        try:
            checkpointer.save(1, m=Held(x=object() if group.rank else 1)).wait()
        except CheckpointError as error:
            return str(error)

    zero, one = run_ranks(2, save)
    assert "m/x cannot be stored" in one
    assert "rank 1 failed" in zero
    assert store.names() == []


def test_a_save_tells_what_it_cost():
    save = Checkpointer(MemoryStore()).save(1, m=Held(x=np.zeros(1000)))
    save.wait()
    assert save.num_bytes == 8000
    assert save.blocked > timedelta(0)
    assert save.took is not None
    assert "step-00000001" in save.path


def test_a_wait_has_a_deadline_and_the_save_goes_on_behind_it():
    release = threading.Event()
    second = timedelta(seconds=0.05)
    save = Save(3, "there", lambda: assert_true(release.wait(30)), num_bytes=0, blocked=second, timeout=second)
    with pytest.raises(CheckpointError, match="step 3 to there is not done after"):
        save.wait()
    assert not save.done
    assert save.error is None
    release.set()
    save.wait(timedelta(seconds=30))
    assert save.done


def assert_true(value):
    assert value


def test_an_unforeseen_error_is_told_too():
    second = timedelta(seconds=30)
    save = Save(3, "there", lambda: assert_true(1 / 0), num_bytes=0, blocked=second, timeout=second)
    with pytest.raises(CheckpointError, match="Step 3 was not saved: division by zero"):
        save.wait()


class Slow(MemoryStore):
    """A store that takes its time."""

    def put(self, name, data):
        time.sleep(0.3 if name.endswith(".safetensors") else 0)
        return super().put(name, data)


def test_a_slow_disk_holds_up_the_next_save_alone():
    with Checkpointer(Slow()) as checkpointer:
        first = checkpointer.save(1, m=Held(w=np.zeros(1000)))
        assert not first.done and first.blocked < timedelta(seconds=0.1)
        second = checkpointer.save(2, m=Held(w=np.zeros(1000)))
        assert first.done and timedelta(seconds=0.15) < second.blocked < timedelta(seconds=2)
    assert checkpointer.steps() == [1, 2]


def test_a_disk_too_slow_costs_saves_and_never_the_ones_under_way():
    with Checkpointer(Slow(), timeout=timedelta(seconds=0.05)) as checkpointer:
        first = checkpointer.save(1, m=Held(w=np.zeros(1000)))
        with pytest.raises(CheckpointError, match=r"The save of step 1 .* is not done after 0 s"):
            checkpointer.save(2, m=Held(w=np.ones(1000)))
        first.wait(SHORT)
        assert checkpointer.steps() == [1] and checkpointer.verify(1) == []
        checkpointer.save(3, m=Held(w=np.ones(1000))).wait(SHORT)
