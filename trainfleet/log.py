"""Logging that knows its rank; set up by the command line only, never by importing."""

from __future__ import annotations

import logging
import sys
from typing import Literal, TextIO

Level = Literal["debug", "info", "warning", "error"]


class _Lines(logging.Formatter):
    """`12:30:05 [2] WARNING trainfleet.data.loader: …`, where INFO is the usual and needs no word."""

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__(datefmt="%H:%M:%S")
        self._rank = f"[{rank}] " if world_size > 1 else ""

    def formatMessage(self, record: logging.LogRecord) -> str:
        time = self.formatTime(record, self.datefmt)
        level = "" if record.levelno == logging.INFO else f"{record.levelname} {record.name}: "
        return f"{time} {self._rank}{level}{record.message}"


class _ToStderr(logging.StreamHandler):  # type: ignore[type-arg]  # generic at run time since Python 3.11 only
    """Writes to what `sys.stderr` is at that moment: a live line on the console stands in for it, and prints above."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


def setup(level: Level = "info", rank: int = 0, world_size: int = 1) -> None:
    """Send what trainfleet logs to stderr, marked with the rank; other ranks than 0 are heard from WARNING on.

    With `debug` all ranks say everything. The root logger and those of other libraries stay as they are;
    a second call replaces the first.
    """
    logger = logging.getLogger("trainfleet")
    for handler in [h for h in logger.handlers if isinstance(h.formatter, _Lines)]:
        logger.removeHandler(handler)
    handler = _ToStderr()
    handler.setFormatter(_Lines(rank, world_size))
    logger.addHandler(handler)
    logger.propagate = False  # a root handler of the user's would print every line twice
    quiet = rank != 0 and level == "info"
    logger.setLevel("WARNING" if quiet else level.upper())
