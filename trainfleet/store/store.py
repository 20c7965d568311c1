"""The Store protocol: named bytes that are either wholly there or not there."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from types import TracebackType
from typing import Protocol, TypeAlias, runtime_checkable

from trainfleet.errors import StoreError

Buffer: TypeAlias = bytes | bytearray | memoryview
"""What can be stored. Anything else with a buffer, such as a NumPy array, goes in as `memoryview(array).cast("B")`."""


PATIENCE = timedelta(seconds=5)
"""How long a hold is waited for: a holder that was killed may take a moment to be gone."""


class OpenBytes(Protocol):
    """Stored bytes held open, to be read in ranges. They stay what they were when opened."""

    @property
    def size(self) -> int: ...

    def read_into(self, offset: int, buffer: Buffer) -> None:
        """Fill the whole of `buffer` from `offset` on; StoreError where the bytes end before."""
        ...

    def close(self) -> None: ...

    def __enter__(self) -> OpenBytes: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...


class Hold(Protocol):
    """That a store is in use by somebody, until `close` or the death of all processes that have `descriptor`."""

    @property
    def descriptor(self) -> int | None:
        """A file descriptor that carries the hold, for a process that shares it; None within one process."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class Store(Protocol):
    """Names are parts joined by `/`, as in `step-00000120/manifest.json`; no name is also the folder of another.

    Every method may raise StoreError, with the reason. After a failed `put` the old bytes stand, or none.
    """

    @property
    def address(self) -> str | None:
        """What `open_store` makes this store of in another process; None where no other process can reach it."""
        ...

    def put(self, name: str, data: Buffer | Iterable[Buffer]) -> int:
        """Store the bytes, or the buffers one after another, in one act and for good; how many bytes that were.

        Replaces what stood there. Of concurrent writers the last to finish wins, whole.
        """
        ...

    def get(self, name: str) -> bytes:
        """All the bytes; NotStored if there are none."""
        ...

    def open(self, name: str) -> OpenBytes:
        """The bytes, to be read in ranges; NotStored if there are none."""
        ...

    def exists(self, name: str) -> bool: ...

    def names(self, prefix: str = "") -> list[str]:
        """All names that begin with `prefix`, sorted."""
        ...

    def delete(self, name: str) -> None:
        """The name is gone afterwards, whether or not it was there."""
        ...

    def hold(self, patience: timedelta = PATIENCE) -> Hold:
        """Take the store for one run; StoreError says whose it is after `patience`.

        Reading and writing are not hindered: whoever writes as a run holds first.
        """
        ...


def parts_of(name: str) -> list[str]:
    """The parts of a name; StoreError where it could not be a name, or would lead out of the store."""
    parts = name.split("/")
    if name == "" or any(part in ("", ".", "..") for part in parts):
        raise StoreError(
            f"{name!r} cannot be a name in a store. Use non-empty parts other than '.' and '..', joined by '/', "
            "with no '/' at either end."
        )
    try:
        name.encode("utf-8")
    except UnicodeEncodeError as error:
        raise StoreError(f"{name!r} cannot be a name in a store: {error.reason}. Use valid Unicode.") from error
    return parts


def chunks_of(data: Buffer | Iterable[Buffer]) -> Iterable[Buffer]:
    """The buffers of `data`, which may be one."""
    return (data,) if isinstance(data, bytes | bytearray | memoryview) else data
