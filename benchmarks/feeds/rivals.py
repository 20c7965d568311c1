"""What others use: ZeroMQ, gRPC, Arrow Flight, and a pickle through a connection of its own."""

from __future__ import annotations

import contextlib
import pickle
import socket
import struct
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
from feeds.sockets import HOST, PAGE, WAIT_SECONDS, Payload


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

    tls = False

    def __init__(self) -> None:
        import pyarrow as pa
        import pyarrow.flight as flight

        feeder = self
        schema = pa.schema([("x", pa.uint8())])

        class Server(flight.FlightServerBase):  # type: ignore[misc]
            def do_get(self, context: Any, ticket: Any) -> Any:
                return flight.GeneratorStream(schema, feeder._batches())

        self._pa, self._schema = pa, schema
        scheme, options = "grpc", {}
        if self.tls:
            from trainfleet.net.tls import Identity

            ours = Identity.make()
            scheme, options = "grpc+tls", {"tls_certificates": [(ours.certificate, ours.key)]}
        self._server = Server(f"{scheme}://{HOST}:0", **options)
        self.address = f"{scheme}://{HOST}:{self._server.port}"
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
        # As with raw TLS and ours here, whose certificate is known by its fingerprint, no authority is asked.
        options = {"disable_server_verification": True} if address.startswith("grpc+tls") else {}
        self._client = flight.connect(address, **options)

    def take(self, size: int, count: int) -> Iterator[Payload]:
        reader = self._client.do_get(self._flight.Ticket(b""))
        for chunk in reader:
            yield chunk.data.column(0).to_numpy(zero_copy_only=True)


class FlightTlsFeeder(FlightFeeder):
    tls = True


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
