"""A store by its URL or path."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from trainfleet.errors import StoreError
from trainfleet.store.file import FileStore
from trainfleet.store.memory import MemoryStore
from trainfleet.store.store import Store


def open_store(place: str | Path) -> Store:
    """The store at a path, `file:///a/folder` or `memory://` (a new, empty one).

    Nothing is read or made yet, so a place without permission shows with the first call.
    """
    if isinstance(place, Path) or "://" not in place:
        if not str(place):
            raise StoreError("A store was asked for without saying where. Give a path or a URL.")
        return FileStore(Path(place).expanduser())
    url = urlsplit(place)
    if url.scheme == "memory" and url.netloc + url.path == "":
        return MemoryStore()
    if url.scheme == "file" and url.netloc in ("", "localhost") and url.path:
        return FileStore(unquote(url.path, errors="surrogateescape"))
    raise StoreError(f"There is no store for {place!r}. Known are a path, file:///a/folder and memory://.")
