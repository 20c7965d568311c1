from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from trainfleet.errors import ConfigError
from trainfleet.events import AlertFired, AnomalySeen, Event, Observers, Restored, Tracked
from trainfleet.monitor.alerts import Alert, Alerts
from trainfleet.monitor.alerts.settings import HIDDEN


class Listens:
    in_loop = True

    def __init__(self) -> None:
        self.heard: list[Event] = []

    def on_event(self, event: Event) -> None:
        self.heard.append(event)

    @property
    def fired(self) -> list[tuple[int, str]]:
        return [(event.step, event.alert) for event in self.heard if isinstance(event, AlertFired)]


def heard(alerts: Alerts, *events: Event) -> Listens:
    listens = Listens()
    observers = Observers([listens, alerts])
    for event in events:
        observers.emit(event)
    observers.close()
    return listens


def test_a_line_tells_the_log_and_the_other_observers(story: Any, caplog: pytest.LogCaptureFixture) -> None:
    losses = [1, 6, 7, 8, 1]
    listens = heard(Alerts("loss > 5 for 2 steps"), *[story.step(n, loss=loss) for n, loss in enumerate(losses, 1)])
    assert listens.fired == [(3, "loss > 5 for 2 steps")]
    assert caplog.messages == ["Alert at step 3: loss > 5 for 2 steps: loss is 7"]
    (event,) = [event for event in listens.heard if isinstance(event, AlertFired)]
    assert event.value == 7 and event.text == "loss > 5 for 2 steps: loss is 7"


def test_a_loss_that_is_not_a_number_is_told(story: Any) -> None:
    assert heard(Alerts("loss > 5"), story.step(1, loss=math.nan), story.step(2, loss=math.nan)).fired == [
        (1, "loss > 5")
    ]


def test_an_anomaly_is_told_each_time_and_by_kind() -> None:
    seen = [
        AnomalySeen(step=n, kind=kind, what="x", policy="warn") for n, kind in enumerate(["slow_rank", "loss_spike"])
    ]
    listens = heard(Alerts("anomaly", "anomaly loss_spike"), *seen)
    assert listens.fired == [(0, "anomaly"), (1, "anomaly"), (1, "anomaly loss_spike")]


def too_hot(row: Mapping[str, Any]) -> bool | str:
    return "it is too hot" if row["step"] >= 2 and row.get("heat", 0) > 5 else False


def test_a_function_of_the_row_says_when_and_what(story: Any, caplog: pytest.LogCaptureFixture) -> None:
    events = [Tracked(step=1, name="heat", value=9), *[story.step(n) for n in (1, 2, 3)]]
    events += [
        Tracked(step=3, name="heat", value=1),
        story.step(4),
        Tracked(step=4, name="heat", value=9),
        story.step(5),
    ]
    for alerts, name in ((Alerts(too_hot), "too_hot"), (Alerts(f"{__name__}:too_hot"), f"{__name__}:too_hot")):
        assert not alerts.in_loop, "it is somebody else's"
        assert heard(alerts, *events).fired == [(2, name), (5, name)]
    assert caplog.messages[0] == "Alert at step 2: it is too hot"


def test_a_function_that_fails_or_blocks_does_not_stop_the_run(story: Any, caplog: pytest.LogCaptureFixture) -> None:
    heard(Alerts(lambda row: row["missing"]), story.step(1), story.step(2))
    assert [record.levelno for record in caplog.records] == [logging.WARNING] and "missing" in caplog.text
    observers = Observers([Alerts(lambda row: time.sleep(1) or False)], deadline_seconds=0.1)
    observers.emit(story.step(1))
    assert "has not returned from StepEnded" in caplog.text


def test_steps_that_are_taken_again_count_anew(story: Any) -> None:
    events = [story.step(n, loss=9.0) for n in (1, 2)]
    again = [Restored(step=0, path="memory"), *events, story.step(3, loss=9.0)]
    assert heard(Alerts("loss > 5 for 3 steps"), *events, *again).fired == [(3, "loss > 5 for 3 steps")]


def test_a_name_that_never_came_is_said_at_the_end_with_what_is_near(
    story: Any, caplog: pytest.LogCaptureFixture
) -> None:
    heard(Alerts("los > 5", "loss > 99", "validation_loss > 99"), *story.run())
    assert caplog.messages == ["monitor.alerts: 'los > 5' never saw a number named 'los'. Did you mean 'loss'?"]


def test_a_command_is_run_beside_the_loop_and_waited_for_at_the_end(tmp_path: Path, story: Any) -> None:
    command = f"sleep 0.3; echo $ALERT_STEP $ALERT_RUN >> {tmp_path}/told"
    alerts = Alerts(Alert(when="loss > 5", command=command, shell=True))
    observers = Observers([alerts])
    began = time.monotonic()
    for event in (story.started(), story.step(1, loss=9.0), story.step(2, loss=1.0), story.step(3, loss=9.0)):
        observers.emit(event)
    assert time.monotonic() - began < 0.25
    observers.close()
    assert (tmp_path / "told").read_text() == "1 runs/small\n3 runs/small\n"


def test_a_webhook_that_a_run_folder_hid_has_to_be_given_again() -> None:
    kept = Alert(when="loss > 5", webhook="https://example.com/secret").without_secrets()
    assert HIDDEN in (kept.webhook or "")
    with pytest.raises(ConfigError, match=r"webhook of 'loss > 5' at https://example\.com is not kept"):
        Alerts(kept)


def test_thousands_of_names_and_alerts_are_borne(story: Any) -> None:
    alerts = Alerts(*[f"number_{n} > 5" for n in range(50)])
    events = [Tracked(step=1, name=f"number_{n}", value=9.0) for n in range(2000)]
    began = time.monotonic()
    assert len(heard(alerts, *events).fired) == 50 and time.monotonic() - began < 5
