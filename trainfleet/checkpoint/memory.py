"""The memory that every save copies into, shared with the writer process where there is one."""

from __future__ import annotations

import mmap
import os
import sys
import weakref
from typing import Any, NamedTuple

import numpy as np

from trainfleet.checkpoint.arrays import Bytes
from trainfleet.errors import CheckpointError

CAN_BE_SHARED = hasattr(os, "memfd_create")
"""Whether this system has memory that another process can map by a descriptor."""


class Layout(NamedTuple):
    """Where what lies: the same for all saves of states whose structure does not change."""

    number: int
    """No two layouts have the same."""
    places: tuple[Any, ...]
    pieces: tuple[Any, ...]


class StagingMemory:
    """As large as the largest save so far, so that only the first, or `prepare`, has to get it.

    Its pages are touched when it is reserved, and where CUDA is in use they are pinned, so that a copy from the GPU
    takes no detour.
    """

    def __init__(self, *, shared: bool) -> None:
        self._shared = shared
        self._memory: Bytes = np.empty(0, np.uint8)
        self._release: weakref.finalize[[int | None, int | None], StagingMemory] | None = None
        self.descriptor: int | None = None
        """By which another process maps it."""
        self.version = 0
        """Rises when it is had anew, and has to be mapped anew."""
        self.layout: Layout | None = None
        """Of what lies in it since the last save; forgotten when it is had anew."""

    @property
    def num_bytes(self) -> int:
        return int(self._memory.size)

    def reserve(self, size: int) -> Bytes:
        """The first `size` bytes; what lies there is as it was, unless there have to be more of them than before."""
        if size > self._memory.size:
            self.close()  # give the old one back before asking for more
            try:
                self._get(size)
            except (OSError, MemoryError) as error:
                self.close()
                raise CheckpointError(
                    f"There is no memory for a copy of {size:,} bytes, which a save needs: {error}.",
                    hint="Free memory of this host, or spread the state over more ranks.",
                ) from error
        return self._memory[:size]

    def _get(self, size: int) -> None:
        if self._shared:
            self.descriptor = os.memfd_create("trainfleet-checkpoint", os.MFD_CLOEXEC)
            self._release = weakref.finalize(self, _release, self.descriptor, None)
            os.ftruncate(self.descriptor, size)
            self._memory = mapped(self.descriptor, size)
            self.version += 1
        else:
            self._memory = np.empty(size, np.uint8)
        self._memory[:: mmap.PAGESIZE] = 0  # or the first save would wait for each page
        if _pin(self._memory):
            if self._release is not None:
                self._release.detach()
            # An object that nobody closes gives it back too, before the memory itself is gone.
            self._release = weakref.finalize(self, _release, self.descriptor, self._memory.ctypes.data)

    def close(self) -> None:
        """Give it back."""
        release, self._release = self._release, None
        if release is not None:
            release()
        self.layout = None  # it holds on to the memory
        self._memory = np.empty(0, np.uint8)
        self.descriptor = None


def mapped(descriptor: int, size: int) -> Bytes:
    """`size` bytes of the memory behind `descriptor`, all pages there."""
    populate = getattr(mmap, "MAP_POPULATE", 0)
    return np.frombuffer(mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED | populate), np.uint8)


def _pin(memory: Bytes) -> bool:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    return int(torch.cuda.cudart().cudaHostRegister(memory.ctypes.data, memory.size, 0)) == 0


def _release(descriptor: int | None, pinned: int | None) -> None:
    if pinned is not None:
        sys.modules["torch"].cuda.cudart().cudaHostUnregister(pinned)
    if descriptor is not None:
        os.close(descriptor)
