"""Group and Links between threads of one process, over NumPy arrays: for tests, and to read how collectives work.

The ranks share a room. Each call has a number, the same on every rank; a rank lays its array under the number
of its call and goes on; whoever waits for the call waits until all have laid theirs, and reads them.
"""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Literal, TypeVar

import numpy as np

from trainfleet.comm.group import DEADLINE, Array, Json, Reduction
from trainfleet.comm.numbers import check_reduction, reduce_parts, signature
from trainfleet.errors import PeerError
from trainfleet.stopwatch import timed

T = TypeVar("T")


def run_ranks(
    size: int,
    function: Callable[[ThreadGroup], T],
    *,
    timeout: timedelta = DEADLINE,
    deadline: timedelta = DEADLINE,
) -> list[T]:
    """`function(group)` on each of `size` threads; the results by rank, or the error of the rank that failed first.

    `timeout` ends each wait within the group, `deadline` the whole.
    """
    room = _Room(size, timeout)
    results: dict[int, T] = {}

    def run(rank: int) -> None:
        try:
            results[rank] = function(ThreadGroup(room, rank))
        except BaseException as exc:
            room.break_up(exc, f"rank {rank} failed: {exc}")

    threads = [threading.Thread(target=run, args=(rank,), name=f"rank-{rank}", daemon=True) for rank in range(size)]
    ends = time.monotonic() + deadline.total_seconds()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, ends - time.monotonic()))
    if room.failure is not None:
        raise room.failure
    late = [rank for rank, thread in enumerate(threads) if thread.is_alive()]
    if late:
        raise TimeoutError(f"Ranks {late} of {size} did not return within {deadline.total_seconds():g} s.")
    return [results[rank] for rank in range(size)]


class _Room:
    """What the ranks share. Everything in it is touched only while `changed` is held."""

    def __init__(self, size: int, timeout: timedelta) -> None:
        self.size = size
        self.timeout = timeout
        self.changed = threading.Condition()
        self.failure: BaseException | None = None  # the first; from then on every wait raises
        self.reason = ""
        self.calls: dict[int, dict[int, tuple[str, Any]]] = defaultdict(dict)  # by number, then by rank
        self.taken: dict[int, int] = defaultdict(int)  # ranks that have read a call; at `size` it is forgotten
        self.letters: dict[tuple[int, int, int], Any] = {}  # by source, destination and number
        self.rooms: list[_Room] = []  # those split off, which break up with this one

    def break_up(self, failure: BaseException, reason: str) -> None:
        with self.changed:
            if self.failure is None:
                self.failure, self.reason = failure, reason
            self.changed.notify_all()
            rooms = list(self.rooms)
        for room in rooms:
            room.break_up(failure, reason)

    def lay(self, rank: int, number: int, signature: str, value: Any) -> None:
        with self.changed:
            for other, (theirs, _) in self.calls[number].items():
                if theirs != signature:
                    sentence = f"Rank {rank} called {signature}, but rank {other} called {theirs}."
                    self.break_up(PeerError(sentence), sentence)
                    raise PeerError(sentence)
            self.calls[number][rank] = (signature, value)
            self.changed.notify_all()

    def take(self, rank: int, number: int, signature: str, timeout: timedelta | None) -> list[Any]:
        """What every rank laid under `number`, by rank."""
        with self.changed:
            laid = self.calls[number]
            self.wait_until(
                lambda: len(laid) == self.size,
                lambda: (
                    f"rank {rank} called {signature}, but ranks {sorted(set(range(self.size)) - set(laid))} did not"
                ),
                timeout,
            )
            self.taken[number] += 1
            if self.taken[number] == self.size:
                del self.calls[number], self.taken[number]
            return [laid[other][1] for other in range(self.size)]

    def wait_until(self, done: Callable[[], bool], complaint: Callable[[], str], timeout: timedelta | None) -> None:
        seconds = (timeout or self.timeout).total_seconds()
        with timed("communication"):
            self.changed.wait_for(lambda: done() or self.failure is not None, seconds)
        if done():
            return
        if self.failure is not None:
            raise PeerError(f"The group has broken up: {self.reason}") from self.failure
        sentence = f"After {seconds:g} s {complaint()}."
        late = PeerError(sentence[0].upper() + sentence[1:])
        self.break_up(late, sentence)
        raise late


class ThreadGroup:
    """One thread's side of a `Group` with `Links`; `run_ranks` makes them."""

    def __init__(self, room: _Room, rank: int) -> None:
        self.rank = rank
        self._room = room
        self._calls = 0
        self._letters: dict[tuple[str, int], int] = defaultdict(int)

    @property
    def size(self) -> int:
        return self._room.size

    def __repr__(self) -> str:
        return f"ThreadGroup(rank {self.rank} of {self.size})"

    def all_reduce_(self, array: Array, op: Reduction = "sum") -> ThreadWork:
        check_reduction(array, op)
        take = self._lay(f"all_reduce_ {op} of {signature(array)}", array.copy())
        return ThreadWork(lambda timeout: np.copyto(array, reduce_parts(take(timeout), op)))

    def broadcast_(self, array: Array, source: int = 0) -> ThreadWork:
        take = self._lay(
            f"broadcast_ from {source} of {signature(array)}", array.copy() if self.rank == source else None
        )
        return ThreadWork(lambda timeout: np.copyto(array, take(timeout)[source]))

    def all_gather(self, array: Array) -> list[Array]:
        return [part.copy() for part in self._lay(f"all_gather of {signature(array)}", array.copy())(None)]

    def reduce_scatter(self, array: Array, op: Literal["sum", "mean"] = "sum") -> Array:
        check_reduction(array, op)
        if array.ndim == 0 or len(array) % self.size:
            raise ValueError(f"reduce_scatter over {self.size} ranks cannot cut the shape {tuple(array.shape)}.")
        parts = self._lay(f"reduce_scatter {op} of {signature(array)}", array.copy())(None)
        own = len(array) // self.size
        return reduce_parts([part[self.rank * own : (self.rank + 1) * own] for part in parts], op)

    def exchange(self, value: Json) -> list[Json]:
        return [json.loads(text) for text in self._lay("exchange", json.dumps(value))(None)]

    def barrier(self, timeout: timedelta | None = None) -> None:
        self._lay("barrier", None)(timeout)

    def split(self, colour: int, name: str = "") -> ThreadGroup:
        alike = [rank for rank, theirs in enumerate(self.exchange(colour)) if theirs == colour]
        offered = _Room(len(alike), self._room.timeout)
        with self._room.changed:
            self._room.rooms.append(offered)
        room = self._lay("split", offered)(None)[alike[0]]  # that of the first among those alike
        return ThreadGroup(room, alike.index(self.rank))

    def send(self, array: Array, to: int) -> ThreadWork:
        number = self._next("to", to)
        with self._room.changed:
            self._room.letters[self.rank, to, number] = array.copy()
            self._room.changed.notify_all()
        return ThreadWork(lambda timeout: None)

    def recv_(self, array: Array, source: int) -> ThreadWork:
        key = (source, self.rank, self._next("from", source))
        room = self._room

        def receive(timeout: timedelta | None) -> None:
            with room.changed:
                complaint = f"rank {self.rank} called recv_ of {signature(array)}, but rank {source} did not send"
                room.wait_until(lambda: key in room.letters, lambda: complaint, timeout)
                letter = room.letters.pop(key)
            if signature(letter) != signature(array):
                raise PeerError(
                    f"Rank {self.rank} called recv_ of {signature(array)}, but rank {source} sent {signature(letter)}."
                )
            np.copyto(array, letter)

        return ThreadWork(receive)

    def all_to_all(self, arrays: Sequence[Array]) -> list[Array]:
        if len(arrays) != self.size:
            raise ValueError(f"all_to_all over {self.size} ranks got {len(arrays)} arrays; it takes one for each.")
        laid = self._lay(f"all_to_all of {arrays[0].dtype}", [array.copy() for array in arrays])(None)
        return [parts[self.rank] for parts in laid]

    def _lay(self, signature: str, value: Any) -> Callable[[timedelta | None], list[Any]]:
        """Lay down this rank's side of a call; returns how to wait for the others' sides."""
        number, self._calls = self._calls, self._calls + 1
        self._room.lay(self.rank, number, signature, value)
        return lambda timeout: self._room.take(self.rank, number, signature, timeout)

    def _next(self, direction: str, peer: int) -> int:
        self._letters[direction, peer] += 1
        return self._letters[direction, peer]


class ThreadWork:
    """A call whose own side is laid down and whose result is awaited."""

    def __init__(self, finish: Callable[[timedelta | None], None]) -> None:
        self._finish: Callable[[timedelta | None], None] | None = finish

    def wait(self, timeout: timedelta | None = None) -> None:
        finish, self._finish = self._finish, None
        if finish is not None:
            finish(timeout)
