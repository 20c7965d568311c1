"""Alerts: looks at each number of a run, and tells when one is not as it should be."""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trainfleet.errors import ConfigError
from trainfleet.events import AlertFired, AnomalySeen, Event, Observers, Restored, RunEnded, RunStarted, StepEnded
from trainfleet.imports import load_object
from trainfleet.monitor.alerts.command import Command
from trainfleet.monitor.alerts.condition import OfAnomalies, Watch
from trainfleet.monitor.alerts.facts import Facts
from trainfleet.monitor.alerts.numbers import Row, names_in, number_in
from trainfleet.monitor.alerts.settings import HIDDEN, KEY, Alert, site_of
from trainfleet.monitor.outbox import Outbox
from trainfleet.monitor.units import readable_number

logger = logging.getLogger(__name__)

Function = Callable[[Mapping[str, Any]], "bool | str | None"]
"""Of the newest numbers by name: whether to tell, or what."""

CLOSE_SECONDS = 10.0
"""For what is still to be told when the run has ended."""


class Alerts:
    """Each alert is a line such as `loss > 5 for 20 steps`, an `Alert` with whom to tell, or a function of the numbers.

        train(model, data, config, observers=[Alerts("loss > 5 for 20 steps", lambda row: row["grad_norm"] > 100)])

    One fires when its condition has come true, and again only after it was not. The log and the other observers
    (`AlertFired`) hear of it always; a command or a webhook are told in a thread, so that the run never waits.
    """

    def __init__(self, *alerts: str | Alert | Function) -> None:
        self._alerts = [_Watched(alert) for alert in alerts]
        # A function is somebody else's, and may take its time.
        self.in_loop = all(alert.function is None for alert in self._alerts)
        self._observers: Observers | None = None
        self._row = None if self.in_loop else Row()
        self._folder = ""
        self._step = 0

    def meet(self, observers: Observers) -> None:
        self._observers = observers

    def on_event(self, event: Event) -> None:
        if isinstance(event, RunStarted):
            self._folder, self._step = event.folder or "", event.start_step
        if isinstance(event, RunStarted | Restored):
            for alert in self._alerts:
                alert.begin()
            return
        if isinstance(event, RunEnded):
            self._say_what_never_came()
            return
        self._step = getattr(event, "step", self._step)
        if self._row is not None:
            self._row.update(event)
        for alert in self._alerts:
            if (found := alert.look(event, self._row)) is not None:
                self._fire(alert, *found)

    def close(self) -> None:
        for alert in self._alerts:
            alert.close()

    def _fire(self, alert: _Watched, value: float, text: str) -> None:
        facts = Facts(alert=alert.text, text=text, step=self._step, value=value, run=self._folder)
        logger.warning("Alert at step %d: %s", self._step, text)
        if self._observers is not None:
            self._observers.emit(AlertFired(step=self._step, alert=alert.text, value=value, text=text))
        alert.tell(facts)

    def _say_what_never_came(self) -> None:
        for alert in self._alerts:
            if alert.name and alert.known_names and not alert.has_seen:
                near = difflib.get_close_matches(alert.name, sorted(alert.known_names), n=1)
                logger.warning(
                    "%s: %r never saw a number named %r.%s",
                    KEY,
                    alert.text,
                    alert.name,
                    f" Did you mean {near[0]!r}?" if near else "",
                )


class _Watched:
    """One alert with its state and whom it tells."""

    def __init__(self, alert: str | Alert | Function) -> None:
        self.function: Function | None = None
        if isinstance(alert, str):
            alert = Alert(when=alert)
        if isinstance(alert, Alert):
            self.text, self.condition = alert.when.strip(), alert.condition
            if self.condition is None:
                self.function = load_object(self.text, key=KEY)
        else:
            self.text, self.condition, self.function = getattr(alert, "__name__", "function"), None, alert
        self.name = getattr(self.condition, "name", "")
        self.has_seen = False
        self.known_names: set[str] = set()
        self._watch: Watch | None = None
        self._outboxes, self._command = _outboxes(alert) if isinstance(alert, Alert) else ([], None)
        self.begin()

    def begin(self) -> None:
        """Forget what was seen of steps that are taken again."""
        if self.function is not None:
            self._watch = Watch(1, lambda step, value: bool(value))
        elif self.condition is not None and not isinstance(self.condition, OfAnomalies):
            self._watch = self.condition.watch()

    def look(self, event: Event, row: Row | None) -> tuple[float, str] | None:
        """The value and the sentence, where it fires."""
        if self.function is not None:
            return self._ask(event, row)
        if isinstance(self.condition, OfAnomalies):
            if isinstance(event, AnomalySeen) and self.condition.kind in (None, event.kind):
                return math.nan, f"{event.kind}: {event.what}"
            return None
        assert self.condition is not None and self._watch is not None
        value = number_in(event, self.name, wants_largest=self.condition.wants_largest)
        if value is None:
            if not self.has_seen:
                self.known_names.update(names_in(event))
            return None
        self.has_seen = True
        self.known_names.clear()
        if not self._watch.update(getattr(event, "step", 0), value):
            return None
        return value, f"{self.condition}: {self.name} is {readable_number(value)}"

    def _ask(self, event: Event, row: Row | None) -> tuple[float, str] | None:
        if not isinstance(event, StepEnded):
            return None
        assert self.function is not None and self._watch is not None and row is not None
        found = self.function(row.values)
        if not self._watch.update(event.step, float(bool(found))):
            return None
        return event.loss, found if isinstance(found, str) else f"{self.text} says so"

    def tell(self, facts: Facts) -> None:
        for outbox in self._outboxes:
            outbox.put(facts)

    def close(self) -> None:
        for outbox in self._outboxes:
            if not outbox.close(CLOSE_SECONDS) and self._command is not None:
                self._command.kill()


def _outboxes(alert: Alert) -> tuple[list[Outbox[Facts]], Command | None]:
    """One for each of those that are told: the one that is slow keeps no other waiting."""
    outboxes: list[Outbox[Facts]] = []
    command: Command | None = None
    if alert.command is not None:
        command = Command(alert.command, shell=alert.shell, timeout_seconds=alert.timeout_seconds)
        outboxes.append(_outbox(f"The command of alert {alert.when!r}", command.run))
    if alert.webhook is not None:
        from trainfleet.monitor.alerts.webhook import Webhook  # its library takes 20 ms to import

        if HIDDEN in alert.webhook:
            raise ConfigError(
                f"{KEY}: the webhook of {alert.when!r} at {site_of(alert.webhook)} is not kept in a run folder. "
                "Put it into the recipe again."
            )
        webhook = Webhook(alert.webhook, timeout_seconds=alert.timeout_seconds)
        outboxes.append(_outbox(f"The webhook of alert {alert.when!r}", webhook.post))
    return outboxes, command


MOST_WAITING = 100
"""Alerts that wait to be told; a pager that is so far behind is told no more."""


def _outbox(name: str, tell: Callable[[Facts], None]) -> Outbox[Facts]:
    def deliver(waiting: Sequence[Facts]) -> None:
        for facts in waiting:
            tell(facts)

    return Outbox(name, deliver, most_waiting=MOST_WAITING, most_together=1)
