"""A store in this process's memory: for tests, trials and notebooks."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from datetime import timedelta
from types import TracebackType

from trainfleet.errors import NotStored, StoreError
from trainfleet.store.store import PATIENCE, Buffer, chunks_of, parts_of


class MemoryStore:
    """Named bytes in memory, safe between threads, gone with the object."""

    def __init__(self) -> None:
        self._held: dict[str, bytes] = {}
        self._lock = threading.Lock()
        self._use = threading.Semaphore()

    def __repr__(self) -> str:
        return f"MemoryStore({len(self._held)} names)"

    @property
    def address(self) -> None:
        return None

    def put(self, name: str, data: Buffer | Iterable[Buffer]) -> int:
        parts = parts_of(name)
        whole = b"".join(chunks_of(data))
        folders = {"/".join(parts[:n]) for n in range(1, len(parts))}
        with self._lock:
            for other in self._held:
                if other in folders or other.startswith(name + "/"):
                    raise StoreError(
                        f"Cannot store {name!r}: {other!r} is stored, and no name can be another's folder."
                    )
            self._held[name] = whole
        return len(whole)

    def get(self, name: str) -> bytes:
        parts_of(name)
        try:
            return self._held[name]
        except KeyError:
            raise NotStored(f"There is nothing under {name!r} in {self!r}.") from None

    def open(self, name: str) -> _OpenMemory:
        return _OpenMemory(name, self.get(name))

    def exists(self, name: str) -> bool:
        parts_of(name)
        return name in self._held

    def names(self, prefix: str = "") -> list[str]:
        with self._lock:
            return sorted(name for name in self._held if name.startswith(prefix))

    def delete(self, name: str) -> None:
        parts_of(name)
        with self._lock:
            self._held.pop(name, None)

    def hold(self, patience: timedelta = PATIENCE) -> MemoryHold:
        if not self._use.acquire(timeout=patience.total_seconds()):
            raise StoreError(f"{self!r} is in use by another run of this process.", hint="Close that one first.")
        return MemoryHold(self._use)


class MemoryHold:
    def __init__(self, use: threading.Semaphore) -> None:
        self._use: threading.Semaphore | None = use

    @property
    def descriptor(self) -> None:
        return None

    def close(self) -> None:
        use, self._use = self._use, None
        if use is not None:
            use.release()

    def __del__(self) -> None:
        self.close()


class _OpenMemory:
    def __init__(self, name: str, data: bytes) -> None:
        self._name = name
        self._data = data

    @property
    def size(self) -> int:
        return len(self._data)

    def read_into(self, offset: int, buffer: Buffer) -> None:
        target = memoryview(buffer).cast("B")
        if offset < 0 or offset + len(target) > len(self._data):
            raise StoreError(
                f"{self._name!r} has {len(self._data)} bytes; {offset} to {offset + len(target)} were asked for."
            )
        target[:] = self._data[offset : offset + len(target)]

    def close(self) -> None:
        self._data = b""

    def __enter__(self) -> _OpenMemory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        self.close()
