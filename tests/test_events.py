from __future__ import annotations

import dataclasses
import json
import logging

import pytest

from trainfleet import events
from trainfleet.events import Event, Noted, Observers, Tracked

EVENT = Tracked(step=1, name="x", value=2.0)


class Listens:
    def __init__(self) -> None:
        self.heard: list[Event] = []
        self.closed = 0

    def on_event(self, event: Event) -> None:
        self.heard.append(event)

    def close(self) -> None:
        self.closed += 1


class Breaks(Listens):
    def on_event(self, event: Event) -> None:
        super().on_event(event)
        raise RuntimeError("the disk is full")

    def close(self) -> None:
        raise RuntimeError("still full")


def test_each_observer_hears_each_event_in_order():
    first, second = Listens(), Listens()
    observers = Observers([first])
    observers.emit(EVENT)
    observers.add(second)
    observers.emit(Noted(step=1, title="a", text="b"))
    assert [type(e).__name__ for e in first.heard] == ["Tracked", "Noted"]
    assert [type(e).__name__ for e in second.heard] == ["Noted"]


def test_an_observer_that_fails_is_logged_once_and_stops_neither_run_nor_others(caplog):
    broken, fine = Breaks(), Listens()
    observers = Observers([broken, fine])
    with caplog.at_level(logging.WARNING, logger="trainfleet"):
        observers.emit(EVENT)
        observers.emit(EVENT)
    assert len(fine.heard) == len(broken.heard) == 2
    (record,) = caplog.records
    assert "Breaks failed on Tracked" in record.getMessage()
    assert record.exc_info is not None


def test_a_failure_to_close_does_not_keep_the_others_open(caplog):
    fine = Listens()
    Observers([Breaks(), fine]).close()
    assert fine.closed == 1
    assert "Breaks failed to close" in caplog.text


def test_ctrl_c_in_an_observer_is_not_swallowed():
    class Interrupted:
        def on_event(self, event: Event) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Observers([Interrupted()]).emit(EVENT)


@pytest.mark.parametrize(
    "cls", [c for c in vars(events).values() if isinstance(c, type) and issubclass(c, Event) and c is not Event]
)
def test_an_event_is_frozen_and_plain(cls):
    """Plain numbers and texts only, so that an observer can keep, print or send it."""
    plain = {"int": 1, "float": 1.0, "str": "a", "bool": True, "Mapping": {"a": 1.0}, "Sequence": [1]}
    values = {}
    for field in dataclasses.fields(cls):
        kind = str(field.type).split(" |")[0].split("[")[0]
        values[field.name] = plain[kind]
    event = cls(**values)
    assert json.loads(json.dumps(dataclasses.asdict(event))) == values
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(event, dataclasses.fields(cls)[0].name, 2)
