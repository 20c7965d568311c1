"""A run on the console: a live line in a terminal, plain lines in a pipe."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TextIO

from trainfleet.events import Event
from trainfleet.monitor.lines import Lines

if TYPE_CHECKING:
    from trainfleet.monitor.live import LiveLine


class Console:
    """For the rank that speaks for all; the other ranks have none."""

    in_loop = True

    def __init__(self, file: TextIO | None = None, *, log_interval: int = 10) -> None:
        """`file` is standard output unless given; `log_interval` is the steps from one plain line to the next."""
        file = sys.stdout if file is None else file
        self._view: Lines | LiveLine = Lines(file, log_interval=log_interval)
        if _can_move_cursor(file):
            from trainfleet.monitor.live import LiveLine

            self._view = LiveLine(file)

    def on_event(self, event: Event) -> None:
        self._view.on_event(event)

    def close(self) -> None:
        self._view.close()


def _can_move_cursor(file: TextIO) -> bool:
    if not file.isatty():
        return False
    from rich.console import Console as RichConsole

    return not RichConsole(file=file).is_dumb_terminal
