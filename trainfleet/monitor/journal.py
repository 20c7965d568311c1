"""A file that only grows, by whole records, also when the disk is full for a while."""

from __future__ import annotations

import logging
import os
from collections import deque
from pathlib import Path

logger = logging.getLogger(__name__)

MAX_PENDING = 10_000
"""Records kept in memory while nothing can be written; beyond it the oldest are given up and counted."""


class Journal:
    """Appends each record wholly or not at all, and never raises because of the disk.

    A failure is logged once; what could not be written waits in memory and is tried again with the next
    record. What a record needs to survive a process that dies is the operating system's cache, not `fsync`.
    """

    def __init__(self, path: str | Path, *, separator: bytes = b"") -> None:
        """`separator` ends every record; a file whose last record was torn by a kill gets one first."""
        self.path = Path(path)
        self._separator = separator
        self._file: int | None = None
        self._pending: deque[bytes] = deque(maxlen=MAX_PENDING)
        self._lost = 0
        self._failing = False

    def append(self, record: bytes) -> None:
        self._lost += len(self._pending) == MAX_PENDING
        self._pending.append(record + self._separator)
        self._write_pending()

    def close(self) -> None:
        self._write_pending()
        if self._pending or self._lost:
            logger.warning("%s lacks %d records that could not be written.", self.path, len(self._pending) + self._lost)
        self._pending.clear()
        self._lost = 0
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _write_pending(self) -> None:
        try:
            while self._pending:
                if self._file is None:
                    self._file = self._open()
                _append_whole(self._file, self._pending[0])
                self._pending.popleft()
        except OSError as exc:
            if not self._failing:
                logger.warning(
                    "%s cannot be written: %s. The run goes on; up to %d records wait in memory until it can.",
                    self.path,
                    exc.strerror or exc,
                    MAX_PENDING,
                )
            self._failing = True
        else:
            if self._failing:
                logger.warning("%s is written again; %d records were lost.", self.path, self._lost)
            self._failing = False

    def _open(self) -> int:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            end = os.lseek(file, 0, os.SEEK_END)
            if self._separator and end and os.pread(file, 1, end - 1) != self._separator[-1:]:
                _append_whole(file, self._separator)
        except OSError:
            os.close(file)
            raise
        return file


def _append_whole(file: int, record: bytes) -> None:
    """A full disk takes the first part of a record; that part is cut off again."""
    end = os.lseek(file, 0, os.SEEK_END)
    written = 0
    try:
        while written < len(record):
            written += os.write(file, record[written:])
    except OSError:
        os.ftruncate(file, end)
        raise
