"""Who is here: ranks that wait answer for themselves, so that the one that does not can be named."""

from __future__ import annotations

import json
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from trainfleet.errors import PeerError

if TYPE_CHECKING:
    from mpi4py import MPI

_ASK, _ANSWER, _BROKEN = 1, 2, 3
_LOOK_SECONDS = 0.02
"""How often a rank that waits looks whether somebody asks for it."""
_GRACE_SECONDS = 1.0
"""How long a roll call takes at most."""

_all: weakref.WeakSet[RollCall] = weakref.WeakSet()  # of every group of this process: any may be asked


class RollCall:
    """One for each group, with a communicator of its own, which brings all that is needed of mpi4py."""

    def __init__(self, comm: MPI.Comm, name: str) -> None:
        self._comm = comm
        self._where = f" along {name}" if name else ""
        self._sent: list[Any] = []  # small messages under way, with their bytes
        self._is_over = False  # this rank knows that the group has broken up: others that say so say nothing new
        _all.add(self)

    @contextmanager
    def waiting_in(self, what: str) -> Iterator[None]:
        """Within, this process answers a roll call of any of its groups with the name of this call."""
        global _waiting, _looked
        _waiting, _looked = f"{what}{self._where}", time.monotonic()
        try:
            yield
        finally:
            _waiting = ""

    def answer(self) -> None:
        """Answer whoever asks; PeerError where another rank has given up, with its reason."""
        global _looked
        if time.monotonic() - _looked < _LOOK_SECONDS:
            return
        _looked = time.monotonic()
        for roll_call in list(_all):
            roll_call._answer()

    def _answer(self) -> None:
        while (asked := self._take(_ASK)) is not None:
            self._post(_waiting, asked[0], _ANSWER)
        if (broken := self._take(_BROKEN)) is not None and not self._is_over:
            self._is_over = True
            raise PeerError(f"The group has broken up: {broken[1]}")

    def call(self, what: str, waited: float) -> PeerError:
        """The sentence that says who did not come; the others hear it too."""
        rank, size = self._comm.rank, self._comm.size
        others = [other for other in range(size) if other != rank]
        for other in others:
            self._post("", other, _ASK)
        said: dict[int, str] = {}
        ends = time.monotonic() + _GRACE_SECONDS
        while len(said) < len(others) and time.monotonic() < ends:
            time.sleep(0.001)
            self._answer()
            while (answer := self._take(_ANSWER)) is not None:
                said[answer[0]] = answer[1]
        silent = [other for other in others if other not in said]
        elsewhere = {other: text for other, text in said.items() if text != f"{what}{self._where}"}
        sentence = f"Rank {rank} of {size}{self._where} called {what} and waited {waited:.1f} s"
        if silent:
            sentence += f"; {_ranks(silent)} did not come and did not answer: busy elsewhere, hung, or gone"
        for other, text in elsewhere.items():
            sentence += f"; rank {other} waits in {text or 'nothing'}"
        if not silent and not elsewhere:
            sentence += "; all others wait in the same call, so it is only slow"
        self._is_over = True
        for other in others:
            self._post(f"{sentence}.", other, _BROKEN)
        return PeerError(f"{sentence}.", hint="Look at what that rank does; a longer `timeout` helps if it is slow.")

    def _post(self, text: str, to: int, tag: int) -> None:
        words = np.frombuffer(json.dumps(text).encode(), np.uint8)
        self._sent = [(request, held) for request, held in self._sent if not request.Test()]
        self._sent.append((self._comm.Isend(words, to, tag), words))

    def _take(self, tag: int) -> tuple[int, str] | None:
        """The next message of a kind, and who sent it; None where there is none."""
        for source in range(self._comm.size):
            if self._comm.Iprobe(source, tag):
                words = np.zeros(4096, np.uint8)
                request = self._comm.Irecv(words, source, tag)
                while not request.Test():
                    time.sleep(0)
                text = bytes(words).rstrip(b"\0")
                return source, str(json.loads(text))
        return None


_waiting = ""
_looked = 0.0


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
