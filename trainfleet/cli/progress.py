"""How far a long command has come: one line on standard error, in a terminal only."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TextIO, TypeVar

if TYPE_CHECKING:
    from trainfleet.store import Buffer

P = TypeVar("P", bound="Progress")
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

    def __enter__(self: P) -> P:
        return self

    def __exit__(self, *_: object) -> None:
        if self._written:
            print("\r\033[K", end="", file=self._stream, flush=True)


class RowProgress(Progress):
    """Rows of a pass, told after each batch, with the time that the rest will take."""

    def __init__(self, what: str, *, stream: TextIO | None = None) -> None:
        super().__init__(what, stream=stream)
        self._first: tuple[int, float] | None = None

    def __enter__(self: P) -> P:
        if self._shows:
            from trainfleet.cli.standing import Above

            sys.stderr = Above(self._stream)  # what is logged takes the place of the line, which comes back below
        return self

    def __exit__(self, *given: object) -> None:
        if self._shows:
            sys.stderr = self._stream
        super().__exit__(*given)

    def tell(self, done: int, total: int | None) -> None:
        """As `validate` and `predict` tell their `progress`. Rows before the first call were there already."""
        self._total = total
        self._first = self._first or (done, time.monotonic())
        self.add(done - self._done)

    def __str__(self) -> str:
        from trainfleet.monitor.units import readable_duration, readable_rate

        first, since = self._first or (0, self._begun)
        rate = (self._done - first) / max(time.monotonic() - since, 1e-9)
        shown = f"{self._what}  {self._done:,} rows, {readable_rate(rate)}/s"
        if not self._total:
            return shown
        filled = 20 * self._done // self._total
        left = readable_duration((self._total - self._done) / rate) if rate else "?"
        bar = "█" * filled + "░" * (20 - filled)
        return f"{self._what}  {bar}  {self._done:,} of {self._total:,} rows, {readable_rate(rate)}/s, {left} left"
