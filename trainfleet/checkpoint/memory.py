"""The memory that every save copies into, shared with the writer process where there is one."""

from __future__ import annotations

import mmap
import os
import sys
import weakref

import numpy as np

from trainfleet.checkpoint.arrays import Bytes
from trainfleet.errors import CheckpointError

CAN_BE_SHARED = hasattr(os, "memfd_create")
"""Whether this system has memory that another process can map by a descriptor."""


class StagingMemory:
    """As large as the largest save so far, so that only the first, or `prepare`, has to get it.

    Its pages are touched when it is reserved, and where CUDA is in use they are pinned, so that a copy from the GPU
    takes no detour.
    """

    def __init__(self, *, shared: bool) -> None:
        self._shared = shared
        self._memory: Bytes = np.empty(0, np.uint8)
        self._is_pinned = False
        self._give_back: weakref.finalize[[int], StagingMemory] | None = None
        self.descriptor: int | None = None
        """By which another process maps it."""
        self.version = 0
        """Rises when it is had anew, and has to be mapped anew."""

    @property
    def num_bytes(self) -> int:
        return int(self._memory.size)

    def reserve(self, size: int) -> Bytes:
        if size > self._memory.size:
            self.close()  # give the old one back before asking for more
            try:
                self._memory = self._shared_memory(size) if self._shared else np.empty(size, np.uint8)
            except (OSError, MemoryError) as error:
                self.close()
                raise CheckpointError(
                    f"There is no memory for a copy of {size:,} bytes, which a save needs: {error}.",
                    hint="Free memory of this host, or spread the state over more ranks.",
                ) from error
            self._memory[:: mmap.PAGESIZE] = 0  # or the first save would wait for each page
            self._is_pinned = _pin(self._memory)
        return self._memory[:size]

    def _shared_memory(self, size: int) -> Bytes:
        descriptor = os.memfd_create("trainfleet-checkpoint", os.MFD_CLOEXEC)
        self._give_back = weakref.finalize(self, os.close, descriptor)
        os.ftruncate(descriptor, size)
        self.descriptor = descriptor
        self.version += 1
        return mapped(descriptor, size)

    def close(self) -> None:
        """Give it back."""
        if self._is_pinned:
            _unpin(self._memory)
            self._is_pinned = False
        self._memory = np.empty(0, np.uint8)
        if self._give_back is not None:
            self._give_back()
        self._give_back = self.descriptor = None


def mapped(descriptor: int, size: int) -> Bytes:
    """`size` bytes of the memory behind `descriptor`, all pages there."""
    populate = getattr(mmap, "MAP_POPULATE", 0)
    return np.frombuffer(mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED | populate), np.uint8)


def _pin(memory: Bytes) -> bool:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    return int(torch.cuda.cudart().cudaHostRegister(memory.ctypes.data, memory.size, 0)) == 0


def _unpin(memory: Bytes) -> None:
    sys.modules["torch"].cuda.cudart().cudaHostUnregister(memory.ctypes.data)
