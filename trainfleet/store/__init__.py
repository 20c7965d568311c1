"""Named bytes that are wholly there or not there: in files or in memory, by URL."""

from __future__ import annotations

from trainfleet.store.file import FileStore
from trainfleet.store.memory import MemoryStore
from trainfleet.store.store import Buffer, OpenBytes, Store
from trainfleet.store.url import open_store

__all__ = ["Buffer", "FileStore", "MemoryStore", "OpenBytes", "Store", "open_store"]
