"""Named bytes that are wholly there or not there: in files or in memory, by URL."""

from __future__ import annotations

from trainfleet.store.file import FileStore, write_file
from trainfleet.store.hold import HOLD, holder
from trainfleet.store.memory import MemoryStore
from trainfleet.store.replacing import replacing
from trainfleet.store.store import Buffer, Hold, OpenBytes, Store
from trainfleet.store.url import open_store

__all__ = [
    "HOLD",
    "Buffer",
    "FileStore",
    "Hold",
    "MemoryStore",
    "OpenBytes",
    "Store",
    "holder",
    "open_store",
    "replacing",
    "write_file",
]
