"""How far a long command has come: one line on standard error, in a terminal only."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from trainfleet.store import Buffer

_PAUSE_SECONDS = 0.5  # what is done sooner needs no line


class Progress:
    """Counts bytes; `with Progress("step 20", total)` takes the line away at the end."""

    def __init__(self, what: str, total: int | None = None, *, stream: TextIO | None = None) -> None:
        self._what, self._total = what, total
        self._stream = stream or sys.stderr
        self._shows = self._stream.isatty()
        self._begun = self._told = time.monotonic()
        self._done = 0
        self._written = False

    def add(self, num_bytes: int) -> None:
        self._done += num_bytes
        now = time.monotonic()
        if self._shows and now - self._told > _PAUSE_SECONDS:
            self._told, self._written = now, True
            print(f"\r\033[K{self}", end="", file=self._stream, flush=True)

    def watch(self, chunks: Iterable[Buffer]) -> Iterator[Buffer]:
        """The same chunks, counted as they pass."""
        for chunk in chunks:
            yield chunk
            self.add(len(chunk))

    def __str__(self) -> str:
        from trainfleet.monitor.units import readable_bytes

        share = f" of {readable_bytes(self._total)}" if self._total else ""
        rate = self._done / max(time.monotonic() - self._begun, 1e-9)
        return f"{self._what}  {readable_bytes(self._done)}{share}, {readable_bytes(rate)}/s"

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._written:
            print("\r\033[K", end="", file=self._stream, flush=True)
