"""The texts of a run, such as what the model generates, in one file that a person can read."""

from __future__ import annotations

from pathlib import Path

from trainfleet.events import Event, Noted
from trainfleet.monitor.journal import Journal


class Samples:
    """Appends every Noted text to `path`, byte for byte, under its step and title."""

    in_loop = True

    def __init__(self, path: str | Path) -> None:
        self._journal = Journal(path)

    def on_event(self, event: Event) -> None:
        if isinstance(event, Noted):
            text = f"── step {event.step}: {event.title} ──\n{event.text}\n\n"
            self._journal.append(text.encode(errors="surrogatepass"))

    def close(self) -> None:
        self._journal.close()
