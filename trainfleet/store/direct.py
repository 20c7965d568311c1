"""Writing a large file past the page cache: the processor hardly notices, and what the cache holds stays there."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os

from trainfleet.store.store import Buffer

BUFFER_BYTES = 4 << 20
_DIRECT = getattr(os, "O_DIRECT", 0)


class DirectFile:
    """Bytes for an empty file, one after another; `finish` makes all of them durable.

    Whole buffers go straight to the device (O_DIRECT), from memory that is aligned as devices want it. What does not
    fill one goes through the page cache, and so does everything where the file system knows no other way.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._buffer = memoryview(mmap.mmap(-1, BUFFER_BYTES))
        self._filled = 0
        self._may_be_direct = bool(_DIRECT)
        self.num_bytes = 0

    def write(self, chunk: Buffer) -> None:
        rest = memoryview(chunk).cast("B")
        self.num_bytes += len(rest)
        while rest:
            count = min(len(rest), BUFFER_BYTES - self._filled)
            self._buffer[self._filled : self._filled + count] = rest[:count]
            self._filled += count
            rest = rest[count:]
            if self._filled == BUFFER_BYTES:
                self._put_out(direct=self._may_be_direct)

    def finish(self) -> None:
        self._put_out(direct=False)
        os.fsync(self._descriptor)

    def _put_out(self, *, direct: bool) -> None:
        rest = self._buffer[: self._filled]
        self._filled = 0
        if not rest:
            return
        self._may_be_direct &= self._switch(direct) == direct
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except OSError as error:
                # Not possible here after all, or no longer, as the device took only a part of the last block.
                if error.errno != errno.EINVAL or not self._may_be_direct:
                    raise
                self._may_be_direct = self._switch(False)
        if not self._may_be_direct:
            self._start_writing()

    def _switch(self, direct: bool) -> bool:
        """Whether the file is written directly from now on."""
        if not _DIRECT:
            return False
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        with contextlib.suppress(OSError):  # EINVAL: this file system has no direct way
            flags = flags | _DIRECT if direct else flags & ~_DIRECT
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags)
            return direct
        return False

    def _start_writing(self) -> None:
        """Let the device begin while the next bytes are made: fsync has less left to wait for."""
        if hasattr(os, "posix_fadvise"):  # "not needed" makes Linux write at once what is not written yet
            with contextlib.suppress(OSError):
                os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
