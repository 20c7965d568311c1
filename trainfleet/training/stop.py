"""StopVote: Ctrl-C or SIGTERM on any rank ends the run on all of them after the same step."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import numpy as np

from trainfleet.comm.group import Group, Work

logger = logging.getLogger(__name__)


class StopVote:
    """Inside, a first signal asks for the end of the run; a second one has its usual effect.

    A signal reaches the ranks at different moments, so each step they compare, while it is computed,
    whether anyone has been asked. Outside the main thread, where signals cannot be caught, nobody asks.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self._asked = False
        self._ballot = np.zeros(1, dtype=np.int64)
        self._work: Work | None = None
        self._former: dict[int, Any] = {}

    def begin(self) -> None:
        """Cast this rank's vote; a collective."""
        self._ballot[0] = self._asked
        self._work = self._group.all_reduce_(self._ballot, op="max")

    def says_stop(self) -> bool:
        """Wait for the votes of the step: whether anyone was asked to stop, the same answer on all ranks."""
        assert self._work is not None
        self._work.wait()
        return bool(self._ballot[0])

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        self._restore()
        logger.info("Got %s; the run ends after this step.", signal.Signals(number).name)

    def _restore(self) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former = {}

    def __enter__(self) -> StopVote:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former[number] = signal.signal(number, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
