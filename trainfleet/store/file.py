"""A store in a folder: each name a file, written beside its place, made durable, then renamed into it.

A file that is being written bears a lock, which the kernel lifts when its writer dies. So whoever comes
later on the same host can tell the leavings of the dead from the work of the living, and sweep only the
former. Locks may not reach other hosts, so what these left is swept after a day untouched.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import secrets
import stat
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from urllib.parse import quote, unquote

from trainfleet.errors import NotStored, StoreError
from trainfleet.store.direct import DirectFile
from trainfleet.store.hold import HOLD, FileHold
from trainfleet.store.store import PATIENCE, Buffer, chunks_of, parts_of

UNFINISHED = ".unfinished-"
"""How names of files begin that are being written. Stored names never do: their leading dot is escaped."""

_PLAIN = " !#$&'()+,-;=@[]^_`{}.~"  # stand for themselves in file names, beside letters and digits
_DAY_SECONDS = 86_400

_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would be larger than this file system or process may write",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission is denied",
    errno.EPERM: "permission is denied",
    errno.EIO: "the device failed to read or write",
    errno.ESTALE: "the network file system has lost the file",
    errno.ENODEV: "the device is gone",
    errno.ENXIO: "the device is gone",
    errno.ENAMETOOLONG: "the name is too long for this file system",
    errno.EMFILE: "this process has too many open files",
    errno.ENFILE: "this machine has too many open files",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EISDIR: "a folder stands there",
    errno.ENOENT: "the folder vanished",
}


class FileStore:
    """Named bytes as files under `folder`, which the first `put` makes.

    Odd characters in names are escaped as in URLs. If the folder vanishes between two calls, or
    becomes one of another device (an unmounted disk), that is an error: it is not made anew elsewhere.
    """

    def __init__(self, folder: str | Path) -> None:
        self._root = Path(folder).absolute()
        self._device: int | None = None  # of the root, once seen
        self._swept = False

    def __repr__(self) -> str:
        return f"FileStore({str(self._root)!r})"

    @property
    def folder(self) -> Path:
        return self._root

    @property
    def address(self) -> str | None:
        # Of a subclass nobody else knows what it does.
        return self._root.as_uri() if type(self) is FileStore else None

    def path_of(self, name: str) -> Path:
        """The file that holds, or would hold, the bytes of `name`."""
        return self._root.joinpath(*(_escape(part) for part in parts_of(name)))

    def put(self, name: str, data: Buffer | Iterable[Buffer]) -> int:
        path = self.path_of(name)
        with _translated("store", name, self._root):
            self._check_root(create=True)
            if not self._swept:
                self._swept = True
                self._sweep()
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
            try:
                size = _write_and_rename(path, self._root, data)
            except BaseException:
                self._remove_empty_folders(path.parent)
                raise
            _fsync_folder(path.parent)
        return size

    def get(self, name: str) -> bytes:
        path = self.path_of(name)
        with _translated("read", name, self._root):
            try:
                return path.read_bytes()
            except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
                raise self._absent(name) from None

    def open(self, name: str) -> _OpenFile:
        path = self.path_of(name)
        with _translated("open", name, self._root):
            try:
                if path.is_dir():
                    raise self._absent(name)
                return _OpenFile(name, self._root, path.open("rb", buffering=0))
            except (FileNotFoundError, NotADirectoryError):
                raise self._absent(name) from None

    def exists(self, name: str) -> bool:
        path = self.path_of(name)
        with _translated("look for", name, self._root):
            return path.is_file()

    def names(self, prefix: str = "") -> list[str]:
        # Only the deepest folder that the prefix names for certain has to be walked.
        folder = prefix.rpartition("/")[0]
        top = self.path_of(folder) if folder else self._root
        with _translated("list", prefix, self._root):
            self._check_root(create=False)
            found = []
            for path in _files_below(top):
                if not path.name.startswith("."):
                    found.append("/".join(unquote(part) for part in path.relative_to(self._root).parts))
        return sorted(name for name in found if name.startswith(prefix))

    def delete(self, name: str) -> None:
        path = self.path_of(name)
        with _translated("delete", name, self._root):
            self._check_root(create=False)
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                path.unlink()
                _fsync_folder(path.parent)
            self._remove_empty_folders(path.parent)

    def hold(self, patience: timedelta = PATIENCE) -> FileHold:
        with _translated("hold", HOLD, self._root):
            self._check_root(create=True)
            return FileHold(self._root, patience)

    def _absent(self, name: str) -> NotStored:
        return NotStored(f"There is nothing under {name!r} in {self._root}.")

    def _check_root(self, *, create: bool) -> None:
        try:
            device = self._root.stat().st_dev
        except FileNotFoundError:
            if self._device is not None:
                raise
            if create:
                for made in _make_folders(self._root, None):
                    _fsync_folder(made.parent)
                self._device = self._root.stat().st_dev
            return
        if self._device is None:
            self._device = device
        elif self._device != device:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV), str(self._root))

    def _sweep(self) -> None:
        for path in list(_files_below(self._root)):
            if path.name.startswith(UNFINISHED):
                _sweep_one(path)
        # A writer that dies may also leave a folder that it had only just made. One that lives makes it again.
        for folder, _, _ in os.walk(self._root, topdown=False):
            self._remove_empty_folders(Path(folder))

    def _remove_empty_folders(self, folder: Path) -> None:
        while folder != self._root:
            try:
                folder.rmdir()
            except FileNotFoundError:
                pass
            except OSError:
                return
            folder = folder.parent


def write_file(path: Path, data: Buffer | Iterable[Buffer]) -> int:
    """Write a file of exactly this name in one act and for good, as a store does; how many bytes that were.

    Its folder is made if need be. StoreError says why it cannot be written; then what stood there stands.
    """
    path = path.absolute()
    with _translated("write", path.name, path.parent):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        for left in path.parent.glob(f"{UNFINISHED}*"):
            _sweep_one(left)
        size = _write_and_rename(path, None, data)
        _fsync_folder(path.parent)
    return size


class _OpenFile:
    def __init__(self, name: str, root: Path, file: io.FileIO) -> None:
        self._name = name
        self._root = root
        self._file = file
        self._size = os.fstat(file.fileno()).st_size

    @property
    def size(self) -> int:
        return self._size

    def read_into(self, offset: int, buffer: Buffer) -> None:
        target = memoryview(buffer).cast("B")
        end = offset + len(target)
        with _translated("read", self._name, self._root):
            self._file.seek(offset)
            while len(target):
                count = self._file.readinto(target)
                if not count:
                    raise StoreError(f"{self._name!r} in {self._root} ends before byte {end}; it was cut short.")
                target = target[count:]

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> _OpenFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        self.close()


@contextlib.contextmanager
def _translated(verb: str, name: str, root: Path) -> Iterator[None]:
    """The one place where errors of the operating system become sentences."""
    try:
        yield
    except OSError as error:
        reason = _REASONS.get(error.errno or 0, "")
        said = os.strerror(error.errno) if error.errno else str(error)
        because = f"{reason} ({said})" if reason else said
        raise StoreError(f"Cannot {verb} {name!r} in {root}: {because}.", hint=_hint(error.errno, root)) from error


def _hint(number: int | None, root: Path) -> str | None:
    if number in (errno.ENOSPC, errno.EDQUOT):
        return f"Free some room on the file system of {root}, or name a folder on another one."
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"Make {root} writable for this user, or name another folder."
    if number in (errno.ENOENT, errno.ENODEV, errno.ENXIO, errno.ESTALE):
        return f"See whether the file system of {root} is still mounted."
    return None


def _escape(part: str) -> str:
    escaped = quote(part, safe=_PLAIN)
    return "%2E" + escaped[1:] if escaped.startswith(".") else escaped


def _files_below(folder: Path) -> Iterator[Path]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _files_below(Path(entry.path))
        else:
            yield Path(entry.path)


def _unfinished_here() -> str:
    return f"{UNFINISHED}{_escape(os.uname().nodename)}-"


def _sweep_one(path: Path) -> bool:
    """Remove what a writer left that is dead by now; whether it was one."""
    with contextlib.suppress(OSError):  # a lock refused, or removed by another sweeper: not ours to remove
        ours = path.name.startswith(_unfinished_here())
        if not ours and time.time() - path.stat().st_mtime < _DAY_SECONDS:
            return False
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
            return True
        finally:
            os.close(descriptor)
    return False


def _open_unfinished(folder: Path, root: Path | None) -> tuple[int, Path, list[Path]]:
    """A new locked file in `folder`, and the folders that were made for it, of which a crash could take the entries."""
    made: dict[Path, None] = {}
    for _attempt in range(100):
        path = folder / f"{_unfinished_here()}{secrets.token_hex(8)}"
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            # It may also have been removed, when empty, since we made it.
            made |= dict.fromkeys(_make_folders(folder, root))
            continue
        with contextlib.suppress(OSError):  # a file system without locks: then nothing is ever swept there
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return descriptor, path, list(made)
        os.close(descriptor)  # swept between opening and locking
        time.sleep(0.001)
    raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))


def _write_and_rename(path: Path, root: Path | None, data: Buffer | Iterable[Buffer]) -> int:
    descriptor, unfinished, made = _open_unfinished(path.parent, root)
    # The lock goes with the descriptor, so the file must be in its place, or gone, before that closes.
    try:
        for folder in made:
            _fsync_folder(folder.parent)
        file = DirectFile(descriptor)
        for chunk in chunks_of(data):
            file.write(chunk)
        file.finish()
        unfinished.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise
    finally:
        os.close(descriptor)
    return file.num_bytes


def _make_folders(folder: Path, root: Path | None) -> list[Path]:
    """Make `folder` and its parents (below `root`, where that is given); those that were missing, outermost first."""
    missing: list[Path] = []
    while not folder.exists():
        if folder == root:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
        missing.insert(0, folder)
        folder = folder.parent
    for path in missing:
        try:
            path.mkdir()
        except (FileExistsError, FileNotFoundError):
            if _is_in_the_way(path):
                raise
            # Another has made it, or has removed it, or its parent, as empty. Whoever needs it asks again.
    return missing


def _is_in_the_way(path: Path) -> bool:
    """Whether `path` is something other than a folder: asked once, for it may be removed at any moment."""
    try:
        return not stat.S_ISDIR(path.stat().st_mode)
    except FileNotFoundError:
        return False


def _fsync_folder(folder: Path) -> None:
    """Make the entries of `folder` outlast a crash of the machine."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return  # another removed it: then there is nothing in it to keep
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
