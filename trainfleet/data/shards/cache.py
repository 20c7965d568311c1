"""A folder of bounded size into which whole shards are fetched, shared by all processes of a host.

    NAME         a whole shard: it got this name when its last byte was there
    NAME.part    one that is being fetched; whoever does so holds a lock on it, which dies with the process
    lock         held for moments, by whoever makes room

Files count with their size, parts with the size that was reserved for them. Whoever needs room removes what was used
longest ago. Readers hold nothing: a shard that is removed while a sample is read stays readable to the end of it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

from trainfleet.errors import DataError

STEP_BYTES = 64 << 20
"""Room that is taken at a time for a shard whose size nobody knows."""
USED_SECONDS = 1.0
"""How exactly it is remembered when a shard was last used."""
POLL_SECONDS = 0.02
PART = ".part"


class Damaged(DataError):
    """A shard is not what it should be; fetched anew it may be."""


class NoRoom(DataError):
    """Other fetches hold the room, and one of them has to give way: this one."""


class Part:
    """A shard on its way into the cache; `write` its bytes in order."""

    def __init__(self, cache: ShardCache, name: str, descriptor: int, keep: Collection[str] | None) -> None:
        self.descriptor, self.written = descriptor, 0
        self.ahead = keep is not None
        """Nobody waits for it yet: better to give up soon than to keep those who will from trying themselves."""
        self._cache, self._name, self._keep, self._reserved = cache, name, keep, 0

    def write(self, data: bytes | memoryview) -> None:
        """Raises DataError where the disk or the cache has no room for it."""
        view = memoryview(data)
        if self._cache.still_there is not None:
            self._cache.still_there()
        if self.written + len(view) > self._reserved:
            self.reserve(self.written + max(len(view), self._cache.step_bytes))
        try:
            while view:
                count = os.pwrite(self.descriptor, view, self.written)
                view, self.written = view[count:], self.written + count
        except OSError as exc:
            raise self._cache.failed(self._name, exc) from exc

    def reserve(self, num_bytes: int) -> None:
        """Make room for so many bytes in all."""
        self._cache.make_room(self._name, self.descriptor, num_bytes, self._keep)
        self._reserved = num_bytes

    def restart(self) -> None:
        """Throw away what was written."""
        self.written = 0

    def end(self) -> None:
        """All is written, and safely so: a rename must not come to a disk before what it names."""
        os.ftruncate(self.descriptor, self.written)
        os.fsync(self.descriptor)


Fetch: TypeAlias = Callable[[Part], None]
"""Writes a whole shard; DataError if it cannot be had."""


class ShardCache:
    """Shards by name, fetched where they are missing; at most `max_bytes` of them, whole or on their way.

    `timeout`: seconds for which another process may fetch a shard without a byte of progress. `still_there` is called
    now and then while one waits and something moves.
    """

    def __init__(self, folder: str | Path, max_bytes: int, *, timeout: float = 120.0) -> None:
        self.folder, self.max_bytes, self.timeout = Path(folder).expanduser(), max_bytes, timeout
        self.still_there: Callable[[], None] | None = None
        self._used: dict[str, float] = {}
        self.step_bytes = max(1, min(STEP_BYTES, max_bytes // 16))
        if max_bytes < 1:
            raise DataError(f"cache_bytes is {max_bytes}; a cache of shards has to hold some.")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        except OSError as exc:
            raise DataError(
                f"The cache of shards {self.folder} cannot be used: {exc.strerror}. Give another folder as cache=."
            ) from exc

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "still_there": None, "_used": {}}

    def open(self, name: str, fetch: Fetch, *, num_bytes: int | None = None) -> int:
        """A descriptor of the shard, for reading, fetched first where it is missing or has another size.

        The caller closes it, and soon: the space of a removed shard is free only then.
        """
        while True:
            descriptor = self._opened(name, num_bytes)
            if descriptor is not None:
                return descriptor
            self._fetch(name, fetch, num_bytes)

    def fetch_ahead(self, name: str, fetch: Fetch, *, num_bytes: int | None, keep: Collection[str]) -> bool:
        """Fetch it if nobody is at it and it fits beside the shards of `keep`; False where it did not come to that."""
        if (self.folder / name).exists():
            return True
        descriptor = self._locked_part(name)
        if descriptor is None:
            return False
        try:
            self._fill(name, descriptor, fetch, num_bytes, keep)
            return True
        except NoRoom:
            return False
        finally:
            _release(descriptor)

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            (self.folder / name).unlink()

    def holds(self, name: str) -> bool:
        return (self.folder / name).exists()

    def _opened(self, name: str, num_bytes: int | None) -> int | None:
        try:
            descriptor = os.open(self.folder / name, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            if num_bytes is not None and os.fstat(descriptor).st_size != num_bytes:
                self.remove(name)
                os.close(descriptor)
                return None
        except OSError:
            os.close(descriptor)
            raise
        now = time.monotonic()
        if now - self._used.get(name, -USED_SECONDS) >= USED_SECONDS:
            self._used[name] = now
            with contextlib.suppress(PermissionError):  # the cache of another user, which we may read
                os.utime(descriptor)
        return descriptor

    # -- fetching ---------------------------------------------------------------------------------------------------

    def _fetch(self, name: str, fetch: Fetch, num_bytes: int | None) -> None:
        """Have the shard in the cache: fetch it, or wait until another process has."""
        waited_since, moved = time.monotonic(), -1
        while not (self.folder / name).exists():
            descriptor = self._locked_part(name)
            if descriptor is not None:
                try:
                    self._fill(name, descriptor, fetch, num_bytes, None)
                    return
                except NoRoom:
                    pass  # those who have the room will have ended soon
                finally:
                    _release(descriptor)
            if (now_at := self._progress()) != moved:
                waited_since, moved = time.monotonic(), now_at
                if self.still_there is not None:
                    self.still_there()
            elif time.monotonic() - waited_since > self.timeout:
                raise DataError(
                    f"Shard {name} is being fetched by another process, without a byte in {self.timeout:g} s. "
                    f"End what hangs there, or use another cache than {self.folder}."
                )
            time.sleep(POLL_SECONDS)

    def _locked_part(self, name: str) -> int | None:
        """The part of a shard that is missing, ours alone; None where another has it, or the shard is there."""
        path = self.folder / (name + PART)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            raise self.failed(name, exc) from exc
        if not _lock(descriptor):
            os.close(descriptor)
            return None
        # The one before us may have renamed or removed what we opened.
        try:
            ours = path.stat().st_ino == os.fstat(descriptor).st_ino
        except FileNotFoundError:
            ours = False
        if ours and (self.folder / name).exists():
            path.unlink(missing_ok=True)
            ours = False
        if not ours:
            _release(descriptor)
            return None
        return descriptor

    def _fill(
        self, name: str, descriptor: int, fetch: Fetch, num_bytes: int | None, keep: Collection[str] | None
    ) -> None:
        path = self.folder / (name + PART)
        part = Part(self, name, descriptor, keep)
        try:
            os.ftruncate(descriptor, 0)
            part.reserve(num_bytes if num_bytes is not None else self.step_bytes)
            fetch(part)
            if num_bytes is not None and part.written != num_bytes:
                raise Damaged(f"Shard {name} came with {part.written} bytes, and should have {num_bytes}.")
            part.end()
            self._used.pop(name, None)
            with self._alone():  # whoever counts must not miss it under both names
                path.rename(self.folder / name)
        except BaseException as exc:
            path.unlink(missing_ok=True)
            if isinstance(exc, OSError) and not isinstance(exc, FileNotFoundError):
                raise self.failed(name, exc) from exc
            raise

    def _progress(self) -> int:
        """Another number whenever any fetch has got on."""
        latest = 0
        for entry in self._entries():
            with contextlib.suppress(FileNotFoundError):
                if entry.name.endswith(PART):
                    latest = max(latest, entry.stat().st_mtime_ns)
        return latest

    def failed(self, name: str, exc: OSError) -> DataError:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            return DataError(
                f"The disk of the cache {self.folder} is full: shard {name} has no room, though the cache may hold "
                f"{self.max_bytes} bytes. Make room there, lower cache_bytes, or give another cache."
            )
        return DataError(f"Shard {name} cannot be written into the cache {self.folder}: {exc.strerror or exc}.")

    # -- room -------------------------------------------------------------------------------------------------------

    def make_room(self, name: str, descriptor: int, num_bytes: int, keep: Collection[str] | None) -> None:
        """Let the part behind `descriptor` have `num_bytes`, and remove what was used longest ago for it.

        With `keep` (reading ahead) those shards stay, and nothing is waited for.
        """
        if num_bytes > self.max_bytes:
            raise DataError(
                f"Shard {name} has {num_bytes} bytes or more, and the cache {self.folder} may hold {self.max_bytes}. "
                "Raise cache_bytes; several times the size of a shard is good."
            )
        waited_since, moved = time.monotonic(), -1
        while not self._tried_room(name, descriptor, num_bytes, keep):
            if keep is not None:
                raise NoRoom(f"There is no room for {name} now.")
            if (now_at := self._progress()) != moved:
                waited_since, moved = time.monotonic(), now_at
                if self.still_there is not None:
                    self.still_there()
            elif time.monotonic() - waited_since > self.timeout:
                raise DataError(
                    f"There was no room for shard {name} in the cache {self.folder} of {self.max_bytes} bytes within "
                    f"{self.timeout:g} s: other processes fetch into it and get no further. Raise cache_bytes."
                )
            time.sleep(POLL_SECONDS)

    def _tried_room(self, name: str, descriptor: int, num_bytes: int, keep: Collection[str] | None) -> bool:
        with self._alone():
            own, others, whole = 0, [], []
            for entry in self._entries():
                with contextlib.suppress(FileNotFoundError):
                    found = entry.stat()
                    if entry.name == name + PART:
                        own = found.st_size
                    elif not entry.name.endswith(PART):
                        whole.append((found.st_mtime_ns, entry.name, found.st_size))
                    elif not self._removed_dead(entry.path):
                        others.append((entry.name, found.st_size))
            used = sum(size for *_, size in whole) + sum(size for _, size in others)
            removable = [(other, size) for _, other, size in sorted(whole) if keep is None or other not in keep]
            while True:
                fits = used + num_bytes <= self.max_bytes
                if fits and self._reserved(name, descriptor, num_bytes, more_can_go=bool(removable)):
                    return True
                if not removable:
                    break
                other, size = removable.pop(0)
                self.remove(other)
                used -= size
            # Two that hold room and want more would wait for each other: all but the first by name give theirs back.
            if own and any(other < name + PART for other, size in others if size):
                raise NoRoom(f"There is no room for {name} now.")
            return False

    def _reserved(self, name: str, descriptor: int, num_bytes: int, *, more_can_go: bool) -> bool:
        """Whether the disk had the room, too; DataError if it has not and no shard is left to remove."""
        try:
            os.posix_fallocate(descriptor, 0, num_bytes)
        except OSError as exc:
            if exc.errno in (errno.ENOSPC, errno.EDQUOT) and more_can_go:
                return False
            if exc.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise self.failed(name, exc) from exc
            os.ftruncate(descriptor, num_bytes)
        return True

    def _removed_dead(self, path: str) -> bool:
        """Whether the part was left behind by a process that is gone; then it is removed."""
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return True
        try:
            if not _lock(descriptor):
                return False
            with contextlib.suppress(FileNotFoundError):
                if Path(path).stat().st_ino == os.fstat(descriptor).st_ino:
                    Path(path).unlink()
            return True
        finally:
            _release(descriptor)

    def _entries(self) -> list[os.DirEntry[str]]:
        with os.scandir(self.folder) as entries:
            return [entry for entry in entries if entry.name != "lock" and entry.is_file(follow_symlinks=False)]

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One at a time makes room, on this host."""
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            ends = time.monotonic() + self.timeout
            while not _lock(descriptor):
                if time.monotonic() > ends:
                    raise DataError(f"Another process has held {self.folder}/lock for {self.timeout:g} s. End it.")
                time.sleep(POLL_SECONDS / 4)
            yield
        finally:
            _release(descriptor)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def _release(descriptor: int) -> None:
    # By name: a process that was forked meanwhile has a duplicate of the descriptor, and of the lock with it.
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)
