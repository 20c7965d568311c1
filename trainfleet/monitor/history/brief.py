"""A run in a line of a list; of one that has ended it is kept, as reading a million steps takes half a minute."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

from trainfleet.deps import installed
from trainfleet.errors import StoreError
from trainfleet.monitor.history.figures import figures
from trainfleet.monitor.history.run import read_run
from trainfleet.monitor.run_folder import RunFolder
from trainfleet.store import holder, replacing

KEPT_FROM_BYTES = 1 << 20
"""Of metrics.jsonl; what is shorter is read anew each time."""


def read_brief(path: str | Path) -> dict[str, Any]:
    """`folder`, `started` and `went_on` (time.time() of the first and the last start, 0 where there is none), figures.

    Errors are those of `read_run`.
    """
    files = RunFolder(path)
    read = _state_of(files.metrics)
    found = _kept(files.brief, read) if read and holder(files.path) is None else None
    if found is None:
        run = read_run(path)
        started, went_on = (run.starts[0].time, run.starts[-1].time) if run.starts else (0.0, 0.0)
        found = {"started": started, "went_on": went_on, **figures(run)}
        if read and read["bytes"] >= KEPT_FROM_BYTES and run.running is None and _state_of(files.metrics) == read:
            with contextlib.suppress(StoreError), replacing(files.brief) as unfinished:
                kept = {"brief": found, "sha256": _digest(read, found)}
                unfinished.write_text(json.dumps(kept, indent=2) + "\n")
    return {"folder": str(files.path), **found}


def _state_of(metrics: Path) -> dict[str, Any] | None:
    """What changes when a line is added or taken away, or when another version reads them."""
    try:
        found = metrics.stat()
    except OSError:
        return None
    return {"bytes": found.st_size, "changed_ns": found.st_mtime_ns, "version": installed("trainfleet")}


def _kept(file: Path, read: dict[str, Any]) -> dict[str, Any] | None:
    try:
        kept = json.loads(file.read_bytes())
        found: dict[str, Any] = kept["brief"]
        return found if kept["sha256"] == _digest(read, found) else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _digest(read: dict[str, Any], found: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([read, found]).encode()).hexdigest()
