"""Rows of any Arrow Flight server: each endpoint that it names is a shard, kept as an Arrow file.

For data that Spark, DuckDB, Java or a database hold: whoever speaks Flight can be a source.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from trainfleet.data.arrow import rows_of
from trainfleet.data.shards.cache import Damaged, Part, ShardCache
from trainfleet.data.shards.counts import UNKNOWN, counted
from trainfleet.data.shards.fetch import patience
from trainfleet.data.shards.sharded import (
    CACHE,
    CACHE_BYTES,
    Columns,
    Shard,
    ShardedSource,
    cached_name,
    chosen,
    read_at,
)
from trainfleet.deps import require
from trainfleet.errors import DataError, TrainfleetError
from trainfleet.net.address import Address
from trainfleet.net.retry import pauses

Result = TypeVar("Result")

ROWS = 1024
"""Rows of a record batch in the cache: row i is in batch i // ROWS."""
HELD_BYTES = 256 << 20
"""Tables up to this are held in each process that reads them: a row costs microseconds then, and 0.2 ms otherwise."""
KEEPALIVE = [("grpc.keepalive_time_ms", 10_000), ("grpc.keepalive_timeout_ms", 10_000)]
"""A server that is gone without a word is found out."""


class FlightTable(ShardedSource):
    """Row i of what a Flight server gives, endpoint after endpoint, as {column: value}, with values as of ArrowTable.

    location       grpc://HOST:PORT, or grpc+tls://HOST:PORT
    path, command  what is asked for: a name with slashes, or words that the server understands, such as SQL
    columns        those to read: names, or {name in a sample: column}
    roots          file with the certificates to trust, for TLS; None: those of the system
    certificate, key     files of a certificate of our own
    token          sent as `authorization: Bearer TOKEN`, to this host alone, and over TLS unless it is on this machine;
                   or file:PATH, of a file that holds it: a recipe is written into the folder of a run
    cache          folder for fetched rows, by their tickets: a server must give the same rows for the same ticket
    cache_bytes, window, timeout     as for MosaicShards
    """

    def __init__(
        self,
        location: str,
        *,
        path: str | None = None,
        command: str | None = None,
        columns: Columns = None,
        roots: str | Path | None = None,
        certificate: str | Path | None = None,
        key: str | Path | None = None,
        token: str | None = None,
        cache: str | Path = CACHE,
        cache_bytes: int = CACHE_BYTES,
        window: int | None = None,
        timeout: float = 60.0,
    ) -> None:
        server = Server(
            location=location,
            path=path,
            command=command,
            roots=_read(roots),
            certificate=_read(certificate),
            key=_read(key),
            token=_told(token),
            timeout=timedelta(seconds=timeout),
        )
        names, endpoints = server.describe()
        self._chosen = chosen(columns, names, f"What {location} gives")
        shared = ShardCache(cache, cache_bytes)
        shards = [
            Shard(
                title=f"{location} endpoint {number}",
                samples=UNKNOWN,
                num_bytes=None,
                name=cached_name(f"{location}/{number}.arrow", f"{path} {command} {ticket!r} {names}"),
                fetch=Fetcher(server, number, ticket, elsewhere).fetch,
            )
            for number, (ticket, elsewhere) in enumerate(endpoints)
        ]
        title = f"Flight {location} {path or command}"
        super().__init__(counted(shards, shared, _count, title=title), shared, window=window, title=title)
        self._holds = sum(shard.num_bytes or 0 for shard in self.shards) <= HELD_BYTES
        self._held: dict[int, dict[str, Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_held": {}}

    def _read(self, number: int, row: int) -> Any:
        if not self._holds:
            return super()._read(number, row)
        if number not in self._held:
            descriptor = self.open_shard(number)
            try:
                with _opened(descriptor, whole=True) as reader:
                    table = reader.read_all()
                    self._held[number] = {name: _held(table.column(c)) for name, c in self._chosen.items()}
            finally:
                os.close(descriptor)
        return {name: _row(column, row) for name, column in self._held[number].items()}

    def _sample(self, number: int, descriptor: int, row: int) -> dict[str, Any]:
        with _opened(descriptor) as reader:
            batch = reader.get_batch(row // ROWS)
            places = {name: batch.schema.get_field_index(column) for name, column in self._chosen.items()}
            return {name: _row(batch.column(at), row % ROWS) for name, at in places.items()}


@dataclass(frozen=True, kw_only=True)
class Server:
    """A Flight server, what is asked of it, and how it is reached."""

    location: str
    path: str | None
    command: str | None
    roots: bytes | None = field(default=None, repr=False)
    certificate: bytes | None = field(default=None, repr=False)
    key: bytes | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    timeout: timedelta = timedelta(seconds=60)

    def __post_init__(self) -> None:
        if (self.path is None) == (self.command is None):
            raise DataError("A Flight server is asked for either a path or a command; give one of them.")
        scheme, separator, rest = self.location.partition("://")
        if not separator or not rest:
            raise DataError(f"location is {self.location!r}; write grpc://HOST:PORT or grpc+tls://HOST:PORT.")
        if self.token is not None and scheme != "grpc+tls" and not Address.parse(rest).is_loopback:
            raise DataError(f"The token for {self.location} would be readable on its way. Use grpc+tls://.")

    def describe(self) -> tuple[list[str], list[tuple[bytes, list[str]]]]:
        """(names of the columns, (ticket, addresses of those who have it) of each endpoint)."""
        flight = _flight()
        descriptor = (
            flight.FlightDescriptor.for_path(*self.path.split("/"))
            if self.path is not None
            else flight.FlightDescriptor.for_command(self.command)
        )

        def ask() -> tuple[list[str], list[tuple[bytes, list[str]]]]:
            with self.connected(self.location) as client:
                info = client.get_flight_info(descriptor, self.options(timeout=self.timeout.total_seconds()))
            endpoints = [
                (bytes(one.ticket.ticket), [at.uri.decode() for at in one.locations]) for one in info.endpoints
            ]
            return list(info.schema.names), endpoints

        return self.patiently(ask, lambda: 0, self.timeout.total_seconds())

    def connected(self, location: str) -> Any:
        return _flight().FlightClient(
            location,
            tls_root_certs=self.roots,
            cert_chain=self.certificate,
            private_key=self.key,
            generic_options=KEEPALIVE,
        )

    def options(self, *, timeout: float | None = None, ours: bool = True) -> Any:
        headers = [(b"authorization", f"Bearer {self.token}".encode())] if self.token and ours else []
        return _flight().FlightCallOptions(timeout=timeout, headers=headers)

    def patiently(self, attempt: Callable[[], Result], progress: Callable[[], int], most: float) -> Result:
        """What `attempt()` returns; again, after pauses, while the server is away, until `progress()` has stayed the
        same for `most` seconds. DataError for what will not pass."""
        pa, flight = require("pyarrow", "data", purpose="Reading Flight"), _flight()
        since, moved, waits = time.monotonic(), progress(), pauses(0.1, 5.0)
        while True:
            try:
                return attempt()
            except TrainfleetError:
                raise
            except (flight.FlightUnauthenticatedError, flight.FlightUnauthorizedError) as exc:
                raise DataError(f"{self.location} does not let us in: {_words(exc)}. Look at the token.") from exc
            except (pa.ArrowInvalid, pa.ArrowKeyError, NotImplementedError, flight.FlightServerError) as exc:
                raise DataError(f"{self.location} cannot give {self.path or self.command!r}: {_words(exc)}") from exc
            except (pa.ArrowException, OSError) as exc:
                pause = next(waits)
                if progress() != moved:
                    since, moved, waits = time.monotonic(), progress(), pauses(0.1, 5.0)
                if time.monotonic() + pause - since > most:
                    raise DataError(f"{self.location} gave nothing for {most:g} s: {_words(exc)}") from exc
                time.sleep(pause)


@dataclass(frozen=True)
class Fetcher:
    """The rows of one endpoint into the cache."""

    server: Server
    number: int
    ticket: bytes
    elsewhere: list[str]

    def fetch(self, part: Part) -> None:
        pa, flight = require("pyarrow", "data", purpose="Reading Flight"), _flight()
        most = 0

        def progress() -> int:
            nonlocal most
            most = max(most, part.written)
            return most

        def attempt() -> None:
            part.restart()
            try:
                self._copy(part, self.ticket, self.elsewhere)
            except (pa.ArrowKeyError, pa.ArrowInvalid, flight.FlightServerError):  # a ticket may have run out since
                _, endpoints = self.server.describe()
                if len(endpoints) <= self.number or endpoints[self.number][0] == self.ticket:
                    raise
                part.restart()
                self._copy(part, *endpoints[self.number])

        self.server.patiently(attempt, progress, patience(self.server.timeout, part))

    def _copy(self, part: Part, ticket: bytes, elsewhere: list[str]) -> None:
        pa, flight = require("pyarrow", "data", purpose="Reading Flight"), _flight()
        # Who asked to be called elsewhere gets no token of ours there.
        others = [uri for uri in elsewhere if not uri.startswith("arrow-flight-reuse-connection")]
        ours = not others or self.server.location in others
        location = self.server.location if ours else others[0]
        with self.server.connected(location) as client:
            reader = client.do_get(flight.Ticket(ticket), self.server.options(ours=ours))
            schema = _plain_schema(pa, reader.schema)
            with pa.PythonFile(_Sink(part), mode="w") as sink, pa.ipc.new_file(sink, schema) as writer:
                for batch in _batches_of(pa, schema, reader):
                    writer.write_batch(batch)


class _Sink:
    """A part of the cache as the file that Arrow writes to."""

    closed = False

    def __init__(self, part: Part) -> None:
        self._part = part

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._part.write(view)
        return len(view)

    def flush(self) -> None:
        """The part knows when it is whole."""

    def close(self) -> None:
        """Nor does it end with its writer."""


def _plain_schema(pa: Any, schema: Any) -> Any:
    """Without dictionaries, which an Arrow file may not change from batch to batch, as a stream may."""
    fields = [f.with_type(f.type.value_type) if pa.types.is_dictionary(f.type) else f for f in schema]
    return pa.schema(fields, metadata=schema.metadata)


def _batches_of(pa: Any, schema: Any, reader: Any) -> Iterator[Any]:
    """All rows, ROWS to a batch, whatever the server's batches are."""
    held, rows = [], 0
    for chunk in reader:
        columns = [c.dictionary_decode() if pa.types.is_dictionary(c.type) else c for c in chunk.data.columns]
        held.append(pa.RecordBatch.from_arrays(columns, schema=schema))
        rows += len(chunk.data)
        if rows >= ROWS:
            table = pa.Table.from_batches(held).combine_chunks()
            whole = rows - rows % ROWS
            for begin in range(0, whole, ROWS):
                yield table.slice(begin, ROWS).combine_chunks().to_batches()[0]
            held, rows = table.slice(whole).to_batches(), rows - whole
    if rows:
        yield pa.Table.from_batches(held).combine_chunks().to_batches()[0]


@contextlib.contextmanager
def _opened(descriptor: int, *, whole: bool = False) -> Iterator[Any]:
    """The Arrow file, mapped; `whole`: read into memory, so that it can stay when the file is gone."""
    pa = require("pyarrow", "data", purpose="Reading Flight")
    try:
        size = os.fstat(descriptor).st_size
        data = read_at(descriptor, 0, size) if whole else mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        yield pa.ipc.open_file(pa.BufferReader(pa.py_buffer(data)))
    except (pa.ArrowInvalid, OSError, ValueError, IndexError) as exc:
        raise Damaged(f"it is no Arrow file: {exc}.") from exc


def _count(shard: Shard, descriptor: int) -> tuple[int, int]:
    with _opened(descriptor) as reader:
        batches = reader.num_record_batches
        rows = (batches - 1) * ROWS + reader.get_batch(batches - 1).num_rows if batches else 0
    return rows, os.fstat(descriptor).st_size


def _held(column: Any) -> Any:
    """The column as an array of its own where rows are numbers or equally many, else as Arrow has it."""
    rows = rows_of(column) if column.null_count == 0 and _is_numeric(column.type) else None
    return rows.copy() if isinstance(rows, np.ndarray) else column


def _row(column: Any, row: int) -> Any:
    """A row in memory of its own: what the file's mapping shows is gone with it.

    From a slice of one row, so that it does not depend on what the rows beside it are.
    """
    value = column[row] if isinstance(column, np.ndarray) else rows_of(column.slice(row, 1))[0]
    return value.copy() if isinstance(value, np.ndarray) else value


def _is_numeric(kind: Any) -> bool:
    types = require("pyarrow", "data", purpose="Reading Flight").types
    inner = kind.value_type if types.is_fixed_size_list(kind) else kind
    return bool(types.is_integer(inner) or types.is_floating(inner) or types.is_boolean(inner))


def _told(token: str | None) -> str | None:
    if token is None or not token.startswith("file:"):
        return token
    return (_read(token.removeprefix("file:")) or b"").decode().strip()


def _read(file: str | Path | None) -> bytes | None:
    if file is None:
        return None
    try:
        return Path(file).expanduser().read_bytes()
    except OSError as exc:
        raise DataError(f"The certificate, key or token {file} cannot be read: {exc.strerror}.") from exc


def _words(exc: BaseException) -> str:
    return re.split(r"\. (?:gRPC client debug context|Detail: )", str(exc))[0].split("\n")[0][:300]


def _flight() -> Any:
    return require("pyarrow.flight", "data", purpose="Reading from an Arrow Flight server")
