"""Ways of getting arrays from one process to another on this host, each as a feeder's side and a trainer's side.

A feeder is asked for `count` payloads and sends them as fast as they are taken; a trainer takes them, and adds up
one number of each page, as somebody who uses them would read them. Each side is alone in its process.
"""

from __future__ import annotations

import contextlib
import mmap
import pickle
import socket
import struct
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

HOST = "127.0.0.1"
PAGE = 4096
WAIT_SECONDS = 60.0

Payload = NDArray[np.uint8]


class Feeder(Protocol):
    address: Any
    """What the trainer's side needs to find it."""

    def feed(self, payload: Payload, count: int) -> None: ...


class Trainer(Protocol):
    def take(self, size: int, count: int) -> Iterator[Payload]: ...


def pages_of(payload: Payload) -> int:
    """The sum of one byte of each page."""
    return int(payload[::PAGE].sum(dtype=np.int64))


# sockets by hand


class RawFeeder:
    """`sendall` of the array."""

    tls = False

    def __init__(self) -> None:
        self._listener = socket.create_server((HOST, 0))
        self.address: Any = self._listener.getsockname()
        self._sock: Any = None

    def feed(self, payload: Payload, count: int) -> None:
        self._sock = self._sock or self._accepted()
        for _ in range(count):
            self._sock.sendall(payload)

    def _accepted(self) -> socket.socket:
        self._listener.settimeout(WAIT_SECONDS)
        sock, _ = self._listener.accept()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if not self.tls:
            return sock
        from trainfleet.net.tls import Identity

        return Identity.make().server_context().wrap_socket(sock, server_side=True)


class SlicedFeeder(RawFeeder):
    """`sendall` of a mebibyte at a time: a plain program that knows what suits the caches and the socket's buffers."""

    def feed(self, payload: Payload, count: int) -> None:
        self._sock = self._sock or self._accepted()
        for _ in range(count):
            for begin in range(0, payload.nbytes, 1 << 20):
                self._sock.sendall(payload[begin : begin + (1 << 20)])


def connected(address: Any, *, tls: bool = False) -> socket.socket:
    sock = socket.create_connection(address)
    if not tls:
        return sock
    from trainfleet.net.tls import pinned_context

    return pinned_context().wrap_socket(sock)


class RawTrainer:
    """`recv_into` one array that is there already, until it is full."""

    tls = False

    def __init__(self, address: Any) -> None:
        self._sock = connected(address, tls=self.tls)
        self._memory = np.empty(0, np.uint8)

    def take(self, size: int, count: int) -> Iterator[Payload]:
        if self._memory.nbytes != size:
            self._memory = np.empty(size, np.uint8)
        for _ in range(count):
            view = self._memory.data
            while view.nbytes:
                view = view[self._sock.recv_into(view, 0, 0 if self.tls else socket.MSG_WAITALL) :]
            yield self._memory


class TlsFeeder(RawFeeder):
    tls = True


class TlsTrainer(RawTrainer):
    tls = True


# ours


class OurFeeder(RawFeeder):
    nearby = False

    def feed(self, payload: Payload, count: int) -> None:
        from trainfleet.net.channel import Channel

        if not isinstance(self._sock, Channel):
            self._sock = Channel(self._accepted(), nearby=self.nearby)
        self._sock.recv(WAIT_SECONDS)
        for number in range(count):
            self._sock.send("batch", {"n": number}, {"x": payload})


class OurTrainer:
    nearby = False
    tls = False

    def __init__(self, address: Any) -> None:
        from trainfleet.net.channel import Channel

        self._channel = Channel(connected(address, tls=self.tls), nearby=self.nearby)

    def take(self, size: int, count: int) -> Iterator[Payload]:
        self._channel.send("go")
        for _ in range(count):
            yield self._channel.recv(WAIT_SECONDS).body["x"]


class OurTlsFeeder(OurFeeder):
    tls = True


class OurTlsTrainer(OurTrainer):
    tls = True


class OurNearbyFeeder(OurFeeder):
    nearby = True


class OurNearbyTrainer(OurTrainer):
    nearby = True


# others


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


class ZmqFeeder:
    def __init__(self) -> None:
        import zmq

        self._socket = zmq.Context().socket(zmq.PUSH)
        self._socket.set_hwm(4)
        self.address = f"tcp://{HOST}:{self._socket.bind_to_random_port(f'tcp://{HOST}')}"

    def feed(self, payload: Payload, count: int) -> None:
        for _ in range(count):
            self._socket.send(payload, copy=False)


class ZmqTrainer:
    def __init__(self, address: Any) -> None:
        import zmq

        self._socket = zmq.Context().socket(zmq.PULL)
        self._socket.set_hwm(4)
        self._socket.connect(address)

    def take(self, size: int, count: int) -> Iterator[Payload]:
        for _ in range(count):
            yield np.frombuffer(self._socket.recv(copy=False).buffer, np.uint8)


class GrpcFeeder:
    """A stream of messages that are bytes, without protobuf."""

    def __init__(self) -> None:
        from concurrent.futures import ThreadPoolExecutor

        import grpc

        self._server = grpc.server(ThreadPoolExecutor(2), options=[("grpc.max_send_message_length", -1)])
        handlers = {"take": grpc.unary_stream_rpc_method_handler(self._stream)}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("feed", handlers),))
        self.address = f"{HOST}:{self._server.add_insecure_port(f'{HOST}:0')}"
        self._server.start()
        self._given: tuple[bytes, int] = (b"", 0)
        self._ready, self._done = threading.Semaphore(0), threading.Semaphore(0)

    def feed(self, payload: Payload, count: int) -> None:
        if len(self._given[0]) != payload.nbytes:
            self._given = (payload.tobytes(), count)
        self._given = (self._given[0], count)
        self._ready.release()
        self._done.acquire(timeout=WAIT_SECONDS)

    def _stream(self, request: bytes, context: Any) -> Iterator[bytes]:
        self._ready.acquire(timeout=WAIT_SECONDS)
        data, count = self._given
        for _ in range(count):
            yield data
        self._done.release()


class GrpcTrainer:
    def __init__(self, address: Any) -> None:
        import grpc

        options = [("grpc.max_receive_message_length", -1)]
        self._call = grpc.insecure_channel(address, options=options).unary_stream("/feed/take")

    def take(self, size: int, count: int) -> Iterator[Payload]:
        for data in self._call(b"", timeout=WAIT_SECONDS):
            yield np.frombuffer(data, np.uint8)


class FlightFeeder:
    """Record batches with one column of bytes."""

    def __init__(self) -> None:
        import pyarrow as pa
        import pyarrow.flight as flight

        feeder = self
        schema = pa.schema([("x", pa.uint8())])

        class Server(flight.FlightServerBase):  # type: ignore[misc]
            def do_get(self, context: Any, ticket: Any) -> Any:
                return flight.GeneratorStream(schema, feeder._batches())

        self._pa, self._schema = pa, schema
        self._server = Server(f"grpc://{HOST}:0")
        self.address = f"grpc://{HOST}:{self._server.port}"
        self._given: tuple[Payload, int] = (np.empty(0, np.uint8), 0)
        self._ready, self._done = threading.Semaphore(0), threading.Semaphore(0)

    def feed(self, payload: Payload, count: int) -> None:
        self._given = (payload, count)
        self._ready.release()
        self._done.acquire(timeout=WAIT_SECONDS)

    def _batches(self) -> Iterator[Any]:
        self._ready.acquire(timeout=WAIT_SECONDS)
        payload, count = self._given
        column = self._pa.Array.from_buffers(self._pa.uint8(), payload.nbytes, [None, self._pa.py_buffer(payload)])
        for _ in range(count):
            yield self._pa.record_batch([column], schema=self._schema)
        self._done.release()


class FlightTrainer:
    def __init__(self, address: Any) -> None:
        import pyarrow.flight as flight

        self._flight = flight
        self._client = flight.connect(address)

    def take(self, size: int, count: int) -> Iterator[Payload]:
        reader = self._client.do_get(self._flight.Ticket(b""))
        for chunk in reader:
            yield chunk.data.column(0).to_numpy(zero_copy_only=True)


class PickleFeeder:
    """A connection for each batch, and a pickle through it; the trainer's side listens, as in the tool that does so."""

    def __init__(self) -> None:
        listener = socket.create_server((HOST, 0))  # only to have a port that is free
        self.address = listener.getsockname()
        listener.close()

    def feed(self, payload: Payload, count: int) -> None:
        for _ in range(count):
            data = pickle.dumps(payload)
            with self._connected() as sock:
                sock.sendall(struct.pack("<Q", len(data)) + data)
                sock.recv(1)

    def _connected(self) -> socket.socket:
        for _ in range(1000):
            with contextlib.suppress(ConnectionRefusedError):
                return socket.create_connection(self.address, timeout=WAIT_SECONDS)
            threading.Event().wait(0.01)
        raise SystemExit("the trainer of the pickles does not listen")


class PickleTrainer:
    """Reads 4096 bytes at a time and adds them to those before."""

    def __init__(self, address: Any) -> None:
        self._listener = socket.create_server(tuple(address))
        self._listener.settimeout(WAIT_SECONDS)

    def take(self, size: int, count: int) -> Iterator[Payload]:
        for _ in range(count):
            sock, _ = self._listener.accept()
            with sock:
                (length,) = struct.unpack("<Q", sock.recv(8, socket.MSG_WAITALL))
                data = b""
                while len(data) < length:
                    data += sock.recv(PAGE)
                sock.sendall(b"!")
            yield pickle.loads(data)


WAYS: dict[str, tuple[type, type]] = {
    "raw TCP": (RawFeeder, RawTrainer),
    "raw TCP, by 1 MiB": (SlicedFeeder, RawTrainer),
    "trainfleet, TCP": (OurFeeder, OurTrainer),
    "ZeroMQ": (ZmqFeeder, ZmqTrainer),
    "Arrow Flight": (FlightFeeder, FlightTrainer),
    "gRPC": (GrpcFeeder, GrpcTrainer),
    "pickle, a connection each": (PickleFeeder, PickleTrainer),
    "raw TLS": (TlsFeeder, TlsTrainer),
    "trainfleet, TLS": (OurTlsFeeder, OurTlsTrainer),
    "shared memory, one copy": (MemoryFeeder, MemoryTrainer),
    "trainfleet, one host": (OurNearbyFeeder, OurNearbyTrainer),
}
NEEDS = {"ZeroMQ": "zmq", "Arrow Flight": "pyarrow", "gRPC": "grpc", "raw TLS": "cryptography"}
NEEDS["trainfleet, TLS"] = "cryptography"
