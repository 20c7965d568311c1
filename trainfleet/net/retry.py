"""Trying again: with growing pauses, within a budget of time, and saying what is waited for."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from threading import Event
from typing import TypeVar

from trainfleet.errors import NotAdmitted, PeerError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_SPEAK_SECONDS = 2.0
"""A wait of that length is said; shorter ones happen at every start."""


def pauses(first: float = 0.05, most: float = 2.0) -> Iterator[float]:
    """Seconds between tries, without end: doubled each time up to `most`, each cut by up to a half at random.

    Without chance, all that lost the same peer would come back in the same moment.
    """
    # Chance of its own: that of the program belongs to its training, which has to be the same again.
    chance, pause = random.Random(), first
    while True:
        yield pause * chance.uniform(0.5, 1.0)
        pause = min(most, pause * 2)


def wait_for(
    what: str,
    attempt: Callable[[float], Result],
    *,
    timeout: timedelta,
    closing: Event | None = None,
    told: Callable[[PeerError], None] | None = None,
) -> Result:
    """What `attempt(seconds left)` returns at last. It raises PeerError for what may pass, and is called again.

    Says once in the log, after two seconds, what is waited for (`the feeder at cpu-0:7700`) and why. NotAdmitted is
    raised at once. At the end of `timeout`: PeerError with the last reason. `closing`, once set, ends the wait too.
    `told` hears the reason of each try that failed, in place of the log.
    """
    begin = time.monotonic()
    ends, said, reason = begin + timeout.total_seconds(), False, ""
    for pause in pauses():
        try:
            return attempt(max(0.001, ends - time.monotonic()))
        except NotAdmitted:
            raise
        except PeerError as exc:
            now = time.monotonic()
            if not reason or now < ends:  # a try that the deadline cut short tells less than the one before
                reason, hint = str(exc), exc.hint
            if closing is not None and closing.is_set():
                raise
            if now + pause >= ends:
                raise PeerError(
                    f"{what[:1].upper()}{what[1:]} could not be reached within {timeout.total_seconds():g} s. {reason}",
                    hint=hint,
                ) from exc
            if told is not None:
                told(exc)
            elif not said and now - begin >= _SPEAK_SECONDS:
                most = f" up to {ends - now:g} s" if timeout < timedelta(days=1) else ""
                logger.info("Waiting%s for %s. %s", most, what, exc)
                said = True
        if closing is None:
            time.sleep(pause)
        else:
            closing.wait(pause)
    raise AssertionError("pauses never end")
