"""A file that takes the place of an older one, wholly or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from trainfleet.errors import StoreError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, which takes its place when the block ends well. StoreError where it cannot.

    Its folder is made if need be. Unlike `write_file` it waits for no disk: for what a run tells while it trains.
    """
    unfinished = path.with_name(f".unfinished.{path.name}")  # libraries look at what a name ends with
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        unfinished.replace(path)
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error.strerror or error}.") from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
