"""Shared memory by hand: one copy of each payload, with words over a socket, or with none."""

from __future__ import annotations

import mmap
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from feeds.sockets import Payload, RawFeeder
from numpy.typing import NDArray


class MemoryFeeder(RawFeeder):
    """Three buffers in a file in memory, one copy into each, and a byte over a socket each way."""

    buffers = 3
    largest = 1 << 24

    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory(dir="/dev/shm", prefix="trainfleet-bench-")
        path = Path(self._folder.name) / "memory"
        with path.open("wb+") as file:
            file.truncate(self.buffers * self.largest)
            self._memory = np.frombuffer(mmap.mmap(file.fileno(), 0), np.uint8)
        self.address = (self.address, str(path))

    def feed(self, payload: Payload, count: int) -> None:
        self._sock = self._sock or self._accepted()
        for number in range(count):
            if number >= self.buffers:
                self._sock.recv(1)
            begin = number % self.buffers * self.largest
            np.copyto(self._memory[begin : begin + payload.nbytes], payload)
            self._sock.sendall(b"!")
        for _ in range(min(count, self.buffers)):
            self._sock.recv(1)


class MemoryTrainer:
    def __init__(self, address: Any) -> None:
        where, path = address
        self._sock = socket.create_connection(where)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with Path(path).open("rb+") as file:
            self._memory = np.frombuffer(mmap.mmap(file.fileno(), 0), np.uint8)

    def take(self, size: int, count: int) -> Iterator[Payload]:
        for number in range(count):
            self._sock.recv(1)
            begin = number % MemoryFeeder.buffers * MemoryFeeder.largest
            yield self._memory[begin : begin + size]
            self._sock.sendall(b"!")


class SpinningFeeder(MemoryFeeder):
    """The same, and neither side ever sleeps: each looks at the other's count, in the memory, until it has changed.

    What a copy into shared memory can reach at most. It takes both cores whole, also where there is nothing to do.
    """

    def __init__(self) -> None:
        super().__init__()
        where, path = self.address
        counts = Path(path).with_name("counts")
        counts.write_bytes(bytes(16))
        self.address = (where, path, str(counts))
        self._counts = counts_in(counts)

    def feed(self, payload: Payload, count: int) -> None:
        sent, taken = self._counts
        for _ in range(count):
            while sent[0] - taken[0] >= self.buffers:
                pass
            begin = int(sent[0]) % self.buffers * self.largest
            np.copyto(self._memory[begin : begin + payload.nbytes], payload)
            sent[0] += 1
        while sent[0] > taken[0]:
            pass


class SpinningTrainer(MemoryTrainer):
    def __init__(self, address: Any) -> None:
        super().__init__(address[:2])
        self._counts = counts_in(Path(address[2]))

    def take(self, size: int, count: int) -> Iterator[Payload]:
        sent, taken = self._counts
        for _ in range(count):
            while sent[0] == taken[0]:
                pass
            begin = int(taken[0]) % MemoryFeeder.buffers * MemoryFeeder.largest
            yield self._memory[begin : begin + size]
            taken[0] += 1


def counts_in(path: Path) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Payloads sent and taken, shared by both sides: one writes the first, the other the second."""
    with path.open("rb+") as file:
        both = np.frombuffer(mmap.mmap(file.fileno(), 16), np.int64)
    return both[:1], both[1:]
