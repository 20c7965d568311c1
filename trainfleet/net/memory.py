"""Buffers for what arrives, used again as soon as nothing that lies in them is left."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from trainfleet.net.structure import ALIGN, Bytes

POOLED_BYTES = 1 << 16  # below this the allocator is as fast as a pool
WASTE = 2  # a free buffer serves what needs at least this part of it
MAX_FREE = 8  # more are left over only after a loop held many batches and let them go


class Pool:
    """`take(n)` gives n bytes that go back to the pool with the last array that lies in them.

    `allocate(num_bytes)` gives memory of the caller's kind (pinned, say) as anything with a writable buffer.
    """

    def __init__(self, allocate: Callable[[int], Any] | None = None) -> None:
        self._allocate = allocate or (lambda num_bytes: np.empty(num_bytes, np.uint8))
        self._free: deque[Bytes] = deque()  # filled by what follows, on whichever thread an array goes
        self._taken: dict[int, tuple[weakref.ref[Bytes], Bytes]] = {}  # by id of the reference

    def take(self, num_bytes: int) -> Bytes:
        if num_bytes < POOLED_BYTES:
            return self._new(num_bytes)
        buffer = self._fitting(num_bytes)
        if buffer is None:
            buffer = self._new(num_bytes + num_bytes // 8)
        # A memoryview between them, or NumPy would name `buffer` itself as the base of every array.
        whole = np.frombuffer(buffer.data, np.uint8)
        reference = weakref.ref(whole, self._take_back)  # weakref.finalize takes four times as long
        self._taken[id(reference)] = reference, buffer
        return whole[:num_bytes]

    def _take_back(self, reference: weakref.ref[Bytes]) -> None:
        self._free.append(self._taken.pop(id(reference))[1])

    @property
    def free_bytes(self) -> int:
        """Bytes kept for what comes next."""
        return sum(buffer.nbytes for buffer in tuple(self._free))

    def _fitting(self, num_bytes: int) -> Bytes | None:
        """The one that came back last, which is the warmest."""
        found, others = None, []
        while found is None and self._free:
            buffer = self._free.pop()
            if num_bytes <= buffer.nbytes <= WASTE * num_bytes + POOLED_BYTES:
                found = buffer
            else:
                others.append(buffer)
        self._free.extendleft(others)
        while len(self._free) > MAX_FREE:
            self._free.popleft()
        return found

    def _new(self, num_bytes: int) -> Bytes:
        given: Any = self._allocate(num_bytes + ALIGN)
        raw = np.frombuffer(given, np.uint8)
        begin = -raw.ctypes.data % ALIGN
        return raw[begin : begin + num_bytes]
