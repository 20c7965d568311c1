"""Group and Links over MPI, for NumPy arrays and torch tensors in CPU memory; the only file that imports mpi4py.

Before each collective travels a line of 64 bytes from every rank that says what it called, with dtype and shape: ranks
that called unlike things hear so from each other, instead of waiting for ever or being ended by MPI. Waiting is done in
small naps (MPI's own takes a core, and where ranks are more than cores it takes turns of milliseconds), and ends at the
deadline with a roll call: whoever waits answers, and who does not is named.

Among few ranks, large arrays are summed in two steps, part by part: every rank adds up its share of a part, divides it
while it is in the caches, and hands it to the others. That moves as many bytes as MPI's own sum, and is as fast with
the division as that is without (benchmarks/mpi_average.py). Sums of float16 and bfloat16, which MPI has not, always go
so, and lose no digits: they are added up in float32 and rounded once.
"""

from __future__ import annotations

import functools
import json
import os
import time
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from trainfleet.comm.gpu_memory import empty, is_on_gpu, reads_gpu_memory, synchronize
from trainfleet.comm.group import DEADLINE, Array, Json, Reduction
from trainfleet.comm.mpi_roll_call import RollCall
from trainfleet.comm.numbers import add_up_, as_numpy, check_reduction, is_small_float, like, reduce_parts, signature
from trainfleet.deps import require
from trainfleet.errors import DependencyError, PeerError
from trainfleet.stopwatch import timed

if TYPE_CHECKING:
    from mpi4py import MPI

Steps: TypeAlias = Iterator[Any]

_LINE = 64  # bytes of a signature; a longer one ends with its checksum
_SHARE_BYTES = 1 << 18  # of each rank in a part of a sum: the caches hold what it adds up (benchmarks/mpi_average.py)
_SHARE_BYTES_IN_TURNS = 1 << 21  # where ranks take turns on the cores: each part costs them a turn
_FEW = 16  # ranks; among more, shares would be many and small, and MPI's own sums know the network
_SPIN_SECONDS = 2e-2  # without progress, before the naps begin
_NAP_SECONDS = 2e-5
_LINE_TAG, _ARRAY_TAG = 1, 2
_abandoned: list[Any] = []  # MPI may still write into what nobody waits for: it lives as long as the process


@functools.cache
def mpi() -> Any:
    """mpi4py's MPI, which starts MPI when it is first imported; DependencyError where it, or a library, is missing."""
    try:
        return require("mpi4py.MPI", "mpi", purpose="MPI")
    except RuntimeError as error:  # mpi4py is there, but found no libmpi
        raise DependencyError(
            f"mpi4py found no MPI library: {error}",
            hint='pip install "trainfleet[mpi]" brings MPICH; or load the module of your cluster.',
        ) from error


def memory_kinds() -> tuple[str, ...]:
    """The kinds of memory that this MPI says it can send from, such as `mpi`, `system`, `cuda`."""
    kinds = mpi().COMM_WORLD.Get_info().Get("mpi_memory_alloc_kinds") or ""
    return tuple(kind.split(":")[0] for kind in kinds.split(",") if kind)


class MpiGroup:
    """A `Group` and `Links` over a communicator, which it copies: its messages never meet those of others."""

    def __init__(
        self, comm: MPI.Comm, *, name: str = "", timeout: timedelta = DEADLINE, in_turns: bool | None = None
    ) -> None:
        self.name = name
        self.timeout = timeout
        self._in_turns = _are_in_turns(comm) if in_turns is None else in_turns
        self._comm = comm.Dup()
        self._lines = comm.Dup()
        self.roll_call = RollCall(comm.Dup(), name)
        self.broken: BaseException | None = None
        self.num_steps = 0
        """Exchanges that have ended: while they do, waiting is worth a core."""
        self._queue: deque[MpiWork] = deque()

    @classmethod
    def world(cls, *, timeout: timedelta = DEADLINE) -> MpiGroup:
        """All ranks that mpiexec started; one rank if nobody did."""
        return cls(mpi().COMM_WORLD, timeout=timeout)

    @property
    def rank(self) -> int:
        return int(self._comm.rank)

    @property
    def size(self) -> int:
        return int(self._comm.size)

    def __repr__(self) -> str:
        return f"MpiGroup({self.name or 'world'}, rank {self.rank} of {self.size})"

    def takes(self, array: Array) -> bool:
        """Whether `array`, which lies in a GPU's memory, may be handed over: this MPI reads it, and can add it up."""
        return is_on_gpu(array) and not is_small_float(array.dtype) and reads_gpu_memory(memory_kinds())

    def _held(self, array: Array) -> Any:
        if not self.takes(array):
            return as_numpy(array)
        synchronize(array)
        return array

    def all_reduce_(self, array: Array, op: Reduction = "sum") -> MpiWork:
        held = self._held(array)
        check_reduction(held, op)

        def steps() -> Steps:
            flat = _flat(held)
            large = flat.nbytes >= _SHARE_BYTES and 1 < self.size <= _FEW and not is_on_gpu(flat)
            if large or is_small_float(flat.dtype):
                yield from self._reduced_in_two_steps(flat, op)
            else:
                yield self._comm.Iallreduce(mpi().IN_PLACE, flat, _op(op))
                if op == "mean":
                    np.divide(flat, self.size, out=flat)
            _put_back(flat, held)

        return self._collective(f"all_reduce_ {op} {signature(held)}", steps())

    def _reduced_in_two_steps(self, flat: Any, op: Reduction) -> Steps:
        share_bytes = _SHARE_BYTES_IN_TURNS if self._in_turns else _SHARE_BYTES
        share = max(1, min(share_bytes // flat.itemsize, -(-flat.size // self.size)))
        received = np.empty(share * self.size, flat.dtype)
        for at in range(0, flat.size, share * self.size):
            part = flat[at : at + share * self.size]
            each = -(-part.size // self.size)
            whole = part if each * self.size == part.size else np.resize(part, each * self.size)
            rows = received[: whole.size].reshape(self.size, each)
            yield self._comm.Ialltoall(_bytes(whole), _bytes(rows))
            yield self._comm.Iallgather(_bytes(add_up_(rows, op)), _bytes(whole))
            if whole is not part:
                part[...] = whole[: part.size]

    def broadcast_(self, array: Array, source: int = 0) -> MpiWork:
        held = self._held(array)

        def steps() -> Steps:
            flat = _flat(held)
            yield self._comm.Ibcast(_bytes(flat), source)
            _put_back(flat, held)

        return self._collective(f"broadcast_ from {source} {signature(held)}", steps())

    def all_gather(self, array: Array) -> list[Array]:
        held = self._held(array)
        parts = empty(held, (self.size, *held.shape))

        def steps() -> Steps:
            yield self._comm.Iallgather(_bytes(_flat(held)), _bytes(parts))

        self._collective(f"all_gather {signature(held)}", steps()).wait()
        return [like(array, part) for part in parts]

    def reduce_scatter(self, array: Array, op: Literal["sum", "mean"] = "sum") -> Array:
        held = self._held(array)
        check_reduction(held, op)
        if held.ndim == 0 or len(held) % self.size:
            raise ValueError(f"reduce_scatter over {self.size} ranks cannot cut the shape {tuple(array.shape)}.")
        own = empty(held, (len(held) // self.size, *held.shape[1:]))

        def steps() -> Steps:
            whole = _flat(held)
            if is_small_float(whole.dtype):
                received = np.empty((self.size, *own.shape), own.dtype)
                yield self._comm.Ialltoall(_bytes(whole), _bytes(received))
                own[...] = reduce_parts(list(received), op)
                return
            yield self._comm.Ireduce_scatter_block(whole, _flat(own), _op(op))
            if op == "mean":
                np.divide(own, self.size, out=own)

        self._collective(f"reduce_scatter {op} {signature(held)}", steps()).wait()
        return like(array, own)

    def exchange(self, value: Json) -> list[Json]:
        text = np.frombuffer(json.dumps(value).encode(), np.uint8)
        texts: list[bytes] = []

        def steps() -> Steps:
            lengths = np.zeros(self.size, np.int64)
            yield self._comm.Iallgather(np.array([text.size], np.int64), lengths)
            joined = np.empty(int(lengths.sum()), np.uint8)
            yield self._comm.Iallgatherv(text, [joined, lengths, _starts(lengths), mpi().BYTE])
            texts.extend(part.tobytes() for part in np.split(joined, np.cumsum(lengths)[:-1]))

        self._collective("exchange", steps()).wait()
        return [json.loads(text) for text in texts]

    def barrier(self, timeout: timedelta | None = None) -> None:
        self._collective("barrier", iter(())).wait(timeout)  # the line beside it is all there is

    def split(self, colour: int, name: str = "") -> MpiGroup:
        self.exchange(colour)  # everyone is here, or is named
        comm = self._comm.Split(colour, self.rank)
        try:
            return MpiGroup(comm, name=name, timeout=self.timeout, in_turns=self._in_turns)
        finally:
            comm.Free()

    def send(self, array: Array, to: int) -> MpiWork:
        held = self._held(array)
        flat, line = _bytes(_flat(held)), _line(signature(held))
        requests = [self._lines.Isend(line, to, _LINE_TAG), self._comm.Isend(flat, to, _ARRAY_TAG)]
        return MpiWork(self, f"send {signature(held)} to {to}", iter(requests), keep=(line, flat))

    def recv_(self, array: Array, source: int) -> MpiWork:
        held, line = self._held(array), np.zeros(_LINE, np.uint8)
        flat = _flat(held)
        # Both now: what is sent later from the same source belongs to later calls.
        requests = [self._lines.Irecv(line, source, _LINE_TAG), self._comm.Irecv(_bytes(flat), source, _ARRAY_TAG)]

        def steps() -> Steps:
            yield requests[0]
            if not np.array_equal(line, _line(signature(held))):
                raise PeerError(
                    f"Rank {self.rank} called recv_ of {signature(held)}, but rank {source} sent {_text(line)}."
                )
            yield requests[1]
            _put_back(flat, held)

        return MpiWork(self, f"recv_ {signature(held)} from {source}", steps())

    def all_to_all(self, arrays: Sequence[Array]) -> list[Array]:
        if len(arrays) != self.size:
            raise ValueError(f"all_to_all over {self.size} ranks got {len(arrays)} arrays; it takes one for each.")
        sent = [as_numpy(array) for array in arrays]
        shapes = [theirs[self.rank] for theirs in self.exchange([list(array.shape) for array in arrays])]
        dtype = sent[0].dtype
        counts = [int(np.prod(shape, dtype=np.int64)) for shape in shapes]
        received = np.empty(sum(counts), dtype)

        def steps() -> Steps:
            flat = np.concatenate([array.reshape(-1) for array in sent])
            out, into = (dtype.itemsize * np.array(each) for each in ([array.size for array in sent], counts))
            yield self._comm.Ialltoallv(
                [_bytes(flat), out, _starts(out), mpi().BYTE], [_bytes(received), into, _starts(into), mpi().BYTE]
            )

        self._collective(f"all_to_all of {dtype}", steps()).wait()
        parts = np.split(received, np.cumsum(counts)[:-1])
        return [like(arrays[0], part.reshape(shape)) for part, shape in zip(parts, shapes, strict=True)]

    def abort(self, exit_code: int) -> None:
        """End all ranks of the run at once, this one too."""
        mpi().COMM_WORLD.Abort(exit_code)

    def _collective(self, what: str, steps: Steps) -> MpiWork:
        """A collective under way: its line now, its steps once all lines have come and are alike."""
        if self.broken is not None:
            raise PeerError(f"The group has broken up: {self.broken}")
        work = MpiWork(self, what, self._lined(what, steps), in_turn=True)
        self._queue.append(work)
        self.advance()
        return work

    def _lined(self, what: str, steps: Steps) -> Steps:
        if self.size == 1:
            return steps
        line, lines = _line(what), np.zeros((self.size, _LINE), np.uint8)
        request = self._lines.Iallgather(line, lines)

        def both() -> Steps:
            yield request
            # Only now: MPI ends the process where it meets arrays of unlike length.
            unlike = [rank for rank in range(self.size) if not np.array_equal(lines[rank], line)]
            if unlike:
                where = f" along {self.name}" if self.name else ""
                theirs = _text(lines[unlike[0]])
                raise PeerError(f"Rank {self.rank}{where} called {_text(line)}, but rank {unlike[0]} called {theirs}.")
            yield from steps

        return both()

    def advance(self) -> None:
        """Carry on with the collectives under way, one after the other: all ranks must start them in one order."""
        while self._queue and self._queue[0].advance():
            self._queue.popleft()

    def give_up(self, error: BaseException, work: MpiWork) -> None:
        """After an error nothing more is exchanged here. MPI may still write into arrays under way, so they stay."""
        self.broken = self.broken or error
        _abandoned.extend([work, *self._queue])
        self._queue.clear()


class MpiWork:
    """A call under way: steps that each begin an exchange of MPI and hand out its request."""

    def __init__(self, group: MpiGroup, what: str, steps: Steps, *, keep: Any = None, in_turn: bool = False) -> None:
        self._group = group
        self._what = what
        self._steps: Steps | None = steps
        self._request: Any = None
        self._keep = keep
        self._in_turn = in_turn  # among the collectives of its group

    def advance(self) -> bool:
        """Whether it is done; goes on to the next step where one has ended."""
        try:
            while self._steps is not None:
                if self._request is not None and not self._request.Test():
                    return False
                self._group.num_steps += 1
                self._request = next(self._steps, None)
                if self._request is None:
                    self._steps = self._keep = None
        except mpi().Exception as error:
            raise PeerError(f"{self._group!r}: {self._what} failed: {error}.") from error
        return True

    def _is_done(self) -> bool:
        self._group.advance()
        return self._steps is None if self._in_turn else self.advance()

    def wait(self, timeout: timedelta | None = None) -> None:
        if self._steps is None:
            return
        try:
            with timed("communication"):
                self._wait((timeout or self._group.timeout).total_seconds())
        except BaseException as error:
            self._group.give_up(error, self)
            raise

    def _wait(self, seconds: float) -> None:
        if self._group.broken is not None:
            raise PeerError(f"The group has broken up: {self._group.broken}")
        roll_call = self._group.roll_call
        began = progressed = time.monotonic()
        num_steps = self._group.num_steps
        with roll_call.waiting_in(self._what):
            while not self._is_done():
                now = time.monotonic()
                if self._group.num_steps != num_steps:
                    progressed, num_steps = now, self._group.num_steps
                if now - progressed < _SPIN_SECONDS:
                    os.sched_yield()
                    continue
                time.sleep(_NAP_SECONDS)
                roll_call.answer()
                if now - began > seconds:
                    raise roll_call.call(self._what, now - began)


def _are_in_turns(comm: MPI.Comm) -> bool:
    """Whether some host has more of these ranks than cores for them; all ranks say the same."""
    on_host = comm.Split_type(mpi().COMM_TYPE_SHARED)
    mine = on_host.size > (os.cpu_count() or 1)
    on_host.Free()
    return bool(comm.allreduce(mine, mpi().LOR))


def _op(op: str) -> Any:
    return {"sum": mpi().SUM, "mean": mpi().SUM, "max": mpi().MAX, "min": mpi().MIN}[op]


def _flat(held: Any) -> Any:
    """All numbers in a row: a view, or a copy of what does not lie in a row."""
    flat = held.reshape(-1)
    return flat if flat.flags.c_contiguous else flat.copy()


def _put_back(flat: Any, held: Any) -> None:
    """Into an array that did not lie in a row, and travelled as a copy."""
    if not held.flags.c_contiguous:
        held[...] = flat.reshape(held.shape)


def _bytes(array: Any) -> Any:
    return array.reshape(-1).view(np.uint8) if array.size else np.empty(0, np.uint8)


def _starts(counts: Any) -> Any:
    return np.concatenate([[0], np.cumsum(counts)[:-1]])


def _line(text: str) -> Any:
    words = text.encode()
    if len(words) > _LINE:
        words = words[: _LINE - 9] + b"~%08x" % zlib.crc32(words)
    return np.frombuffer(words.ljust(_LINE, b"\0"), np.uint8)


def _text(line: Any) -> str:
    return str(bytes(line).rstrip(b"\0").decode(errors="replace"))
