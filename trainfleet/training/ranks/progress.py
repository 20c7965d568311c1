"""Progress: the step that a rank has come to, where its launcher can read it even after the rank was killed."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from trainfleet.events import Event, RunStarted, StepEnded

NAME = "progress"
_NUMBERS = struct.Struct("<qq")  # the step it began after, and the step it has come to


class Progress:
    """An observer that keeps two numbers in a file. It is mapped, so that a step costs no system call."""

    in_loop = True

    def __init__(self, folder: Path) -> None:
        with (folder / NAME).open("w+b") as file:
            file.write(_NUMBERS.pack(0, 0))
            file.flush()
            self._numbers = mmap.mmap(file.fileno(), _NUMBERS.size)
        self._begun = 0

    def on_event(self, event: Event) -> None:
        if isinstance(event, RunStarted):
            self._begun = event.start_step
            _NUMBERS.pack_into(self._numbers, 0, self._begun, self._begun)
        elif isinstance(event, StepEnded):
            _NUMBERS.pack_into(self._numbers, 0, self._begun, event.step)

    def close(self) -> None:
        self._numbers.close()


def read_progress(folder: Path) -> tuple[int, int] | None:
    """The step that the ranks below `folder` began after, and that to which the first of them came.

    None where none has begun to train.
    """
    found = [_NUMBERS.unpack(data) for path in folder.rglob(NAME) if len(data := path.read_bytes()) == _NUMBERS.size]
    return max(found, key=lambda each: each[1], default=None)
