from __future__ import annotations

import contextvars
import gc
import logging
import multiprocessing
import os
import signal
import threading
import time
from typing import Any

import pytest

from trainfleet.courier import Blocked, Courier
from trainfleet.events import Event, Noted, Observers, Tracked
from trainfleet.tracks import Tracks, track

EVENT = Tracked(step=1, name="x", value=2.0)


class Listens:
    def __init__(self) -> None:
        self.heard: list[Event] = []
        self.threads: set[int] = set()
        self.closed = 0

    def on_event(self, event: Event) -> None:
        self.heard.append(event)
        self.threads.add(threading.get_ident())

    def close(self) -> None:
        self.closed += 1


class Ours(Listens):
    in_loop = True


class Blocks(Listens):
    """From its second event on, until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.let_go = threading.Event()
        self.tells: Observers | None = None

    def on_event(self, event: Event) -> None:
        super().on_event(event)
        if len(self.heard) == 2:
            self.let_go.wait(30)
            if self.tells is not None:
                self.tells.emit(Tracked(step=9, name="late", value=0.0))


def couriers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "observers"]


def test_ours_are_called_in_the_loop_and_all_others_in_one_thread_that_ends_with_them():
    ours, first, second = Ours(), Listens(), Listens()
    observers = Observers([ours, first, second])
    for _ in range(3):
        observers.emit(EVENT)
        assert len(ours.heard) == len(first.heard) == len(second.heard), "told when emit returns"
    assert ours.threads == {threading.get_ident()} and first.threads == second.threads != ours.threads
    observers.close()
    wait_until(lambda: not first.threads & {thread.ident for thread in couriers()})
    assert (ours.closed, first.closed) == (1, 1)


def test_with_ours_alone_there_is_no_thread():
    before = set(couriers())
    observers = Observers([Ours()])
    observers.emit(EVENT)
    assert not set(couriers()) - before


def test_observers_that_nobody_closes_leave_no_thread():
    before = set(couriers())
    observers = Observers([Listens()])
    observers.emit(EVENT)
    ours = set(couriers()) - before
    assert len(ours) == 1
    del observers
    gc.collect()
    wait_until(lambda: not ours & set(couriers()))


def test_one_that_blocks_is_left_out_after_its_deadline_and_what_it_missed_is_told(caplog):
    blocks, fine = Blocks(), Listens()
    observers = Observers([blocks, fine], deadline_seconds=0.1)
    began = time.monotonic()
    with caplog.at_level(logging.WARNING, logger="trainfleet"):
        for _ in range(5):
            observers.emit(EVENT)
        assert 0.1 <= time.monotonic() - began < 5
        assert len(blocks.heard) == 2 and len(fine.heard) == 5
        (warning,) = caplog.messages
        assert warning.startswith("Observer Blocks has not returned from Tracked in 0.1 s")
        observers.close()
    assert caplog.messages[1:] == ["Observer Blocks missed the last 4 events."]
    assert (blocks.closed, fine.closed) == (0, 1)
    blocks.let_go.set()


def test_one_that_was_left_behind_is_not_heard_when_it_comes_back():
    blocks, ours, fine = Blocks(), Ours(), Listens()
    observers = Observers([blocks, ours, fine], deadline_seconds=0.1)
    blocks.tells = observers
    for _ in range(2):
        observers.emit(EVENT)
    blocks.let_go.set()
    time.sleep(0.2)
    observers.emit(EVENT)
    assert [event.name for event in ours.heard if isinstance(event, Tracked)] == ["x"] * 3
    assert len(fine.heard) == 3


def test_a_close_that_blocks_ends_too(caplog):
    class Stays(Listens):
        def close(self) -> None:
            threading.Event().wait(30)

    fine = Listens()
    began = time.monotonic()
    Observers([Stays(), fine], deadline_seconds=0.1).close()
    assert time.monotonic() - began < 5 and fine.closed == 1
    assert "Observer Stays has not returned from close in 0.1 s" in caplog.text


class Tells(Listens):
    """Something of its own at each note, as a callback does."""

    def meet(self, observers: Observers) -> None:
        self.observers = observers

    def on_event(self, event: Event) -> None:
        super().on_event(event)
        if isinstance(event, Noted):
            self.observers.emit(EVENT)


@pytest.mark.parametrize("kind", [Tells, type("TellsInLoop", (Tells,), {"in_loop": True})])
def test_an_observer_may_tell_the_others_something(kind):
    tells, ours, others = kind(), Ours(), Listens()
    Observers([tells, ours, others], deadline_seconds=5).emit(Noted(step=1, title="a", text="b"))
    assert [type(event).__name__ for event in tells.heard] == ["Noted", "Tracked"]
    assert (
        {type(event).__name__ for event in ours.heard}
        == {"Noted", "Tracked"}
        == {type(event).__name__ for event in others.heard}
    )


def test_who_tells_one_that_blocks_is_left_out_with_it(caplog):
    blocks, tells, fine = Blocks(), Tells(), Listens()
    blocks.heard.append(EVENT)
    observers = Observers([tells, blocks, fine], deadline_seconds=0.1)
    observers.emit(Noted(step=1, title="a", text="b"))
    assert "Observer Blocks in Tells has not returned from Noted" in caplog.text
    assert fine.heard and len(tells.heard) == 2
    blocks.let_go.set()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit(3)])
def test_what_ends_a_program_ends_the_loop(error):
    class Ends(Listens):
        def on_event(self, event: Event) -> None:
            raise error

    with pytest.raises(BaseException) as caught:
        Observers([Ends()]).emit(EVENT)
    assert caught.value is error or caught.type is error


@pytest.fixture
def interruptible():
    """Whoever was started in the background of a shell ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_reaches_a_loop_that_waits_for_an_observer_which_then_ends_in_its_own_time(interruptible):
    class Slow(Listens):
        def on_event(self, event: Event) -> None:
            if not self.heard:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.3)
            super().on_event(event)

    slow = Slow()
    observers = Observers([slow], deadline_seconds=5)
    with pytest.raises(KeyboardInterrupt):
        observers.emit(EVENT)
    observers.emit(Noted(step=1, title="a", text="b"))
    assert [type(event).__name__ for event in slow.heard] == ["Tracked", "Noted"], "in order, one at a time"


def test_the_deadline_is_that_of_each_call_and_not_of_those_before_it(interruptible):
    class Slow(Listens):
        def on_event(self, event: Event) -> None:
            if not self.heard:
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.35)
            super().on_event(event)

    slow = Slow()
    observers = Observers([slow], deadline_seconds=0.5)
    with pytest.raises(KeyboardInterrupt):
        observers.emit(EVENT)
    observers.emit(EVENT)  # waits 0.35 s for the one before, and 0.35 s for its own
    assert len(slow.heard) == 2


def test_a_call_that_waits_behind_one_that_blocks_is_made_by_another_thread(interruptible):
    let_go, made = threading.Event(), []
    courier = Courier()

    def blocks() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        let_go.wait(30)

    with pytest.raises(KeyboardInterrupt):
        courier.call(blocks, caller="a", deadline_seconds=5)
    with pytest.raises(Blocked) as caught:
        courier.call(lambda: made.append(1), caller="b", deadline_seconds=0.1)
    assert caught.value.callers == ("a",) and not courier.is_usable
    let_go.set()
    time.sleep(0.1)
    assert made == [], "what was not begun is never begun by a thread that was left behind"


def test_the_modes_and_variables_of_the_loop_hold():
    torch: Any = pytest.importorskip("torch")
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable", default=0)
    seen = []

    class Looks(Listens):
        def on_event(self, event: Event) -> None:
            seen.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled(), variable.get()))
            torch.set_grad_enabled(False)

    observers = Observers([Looks()])
    observers.emit(EVENT)
    variable.set(7)
    with torch.no_grad():
        observers.emit(EVENT)
    with torch.inference_mode():
        observers.emit(EVENT)
    observers.emit(EVENT)
    assert seen == [(True, False, 0), (False, False, 7), (False, True, 7), (True, False, 7)]
    assert torch.is_grad_enabled()


def test_a_forked_process_has_a_thread_of_its_own():
    """Also one that is forked while an observer is being told."""
    fork = multiprocessing.get_context("fork")
    listens, children = Listens(), []
    observers = Observers([listens], deadline_seconds=10)

    def in_child(length: int) -> None:
        observers.emit(EVENT)
        os._exit(0 if len(listens.heard) == length + 1 else 1)

    class Forks(Listens):
        def on_event(self, event: Event) -> None:
            children.append(fork.Process(target=in_child, args=(len(listens.heard),)))
            children[-1].start()

    observers.emit(EVENT)
    children.append(fork.Process(target=in_child, args=(1,)))
    children[-1].start()
    Observers([Forks()]).emit(EVENT)
    for child in children:
        child.join(20)
    assert [child.exitcode for child in children] == [0, 0]


def wait_until(holds: Any, seconds: float = 5.0) -> None:
    ends = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < ends
        time.sleep(0.005)


def test_an_observer_beside_the_loop_tracks_for_the_run_that_it_hears():
    class Counts(Listens):
        def on_event(self, event: Event) -> None:
            track("heard", 3.0)

    with Tracks() as tracks:
        Observers([Counts()]).emit(EVENT)
    assert [row[0] for row in tracks.take()] == ["heard"]
