"""Who is at a service is known, what guests have had is not forgotten when they go, and a close ends all visits."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from trainfleet.errors import PeerError
from trainfleet.net.dial import remember
from trainfleet.net.guests import Guests
from trainfleet.net.hello import Peer


class Visit:
    """Lasts until its socket ends; each byte is a batch."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock, self.num_batches = sock, 0
        if sock.recv(1) == b"?":
            raise PeerError("It came in broken.")

    def stay(self) -> None:
        while word := self.sock.recv(1):
            if word == b"!":
                raise PeerError("It said what cannot be.")
            self.num_batches += 1

    def close(self) -> None:
        self.sock.shutdown(socket.SHUT_RDWR)


def guests(most: int | None = None) -> Guests[Visit]:
    return Guests(Visit, Visit.stay, lambda visit: (visit.num_batches, 10 * visit.num_batches), name="Guest", most=most)


@contextmanager
def visiting(
    service: Guests[Visit], name: str, first: bytes = b" "
) -> Iterator[tuple[socket.socket, threading.Thread]]:
    ours, theirs = socket.socketpair()
    remember(theirs, Peer(role="guest", address=name, version="1", proved=False))
    ours.sendall(first)
    thread = threading.Thread(target=service.meet, args=(theirs,))
    thread.start()
    try:
        yield ours, thread
    finally:
        ours.close()
        thread.join(10)
        theirs.close()
        assert not thread.is_alive()


def eventually(met: Callable[[], bool]) -> bool:
    pause = threading.Event()
    return any(met() or pause.wait(0.01) for _ in range(1000))


def test_totals_count_those_who_are_here_and_those_who_have_gone() -> None:
    service = guests()
    assert service.totals is None and service.addresses == []
    with visiting(service, "a") as (a, _), visiting(service, "b") as (b, _):
        a.sendall(b"...")
        b.sendall(b"..")
        assert eventually(lambda: service.totals == (5, 50)) and sorted(service.addresses) == ["a", "b"]
        a.close()
        assert eventually(lambda: service.addresses == ["b"]) and service.totals == (5, 50)
    assert service.here == [] and service.totals == (5, 50)


def test_how_each_went_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    service = guests()
    with visiting(service, "well") as (sock, _):
        sock.sendall(b".")
    with visiting(service, "odd") as (sock, _):
        sock.sendall(b"..!")
    with visiting(service, "broken", b"?"):
        pass
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "Guest well is here.",
        "Guest well is done: 1 batches.",
        "Guest odd is here.",
        "Guest odd has gone after 2 batches: It said what cannot be.",
        "It came in broken.",
    ]


def test_one_too_many_is_sent_away() -> None:
    service = guests(most=1)
    with visiting(service, "first"):
        assert eventually(lambda: service.addresses == ["first"])
        with visiting(service, "second") as (sock, thread):
            thread.join(10)
            assert sock.recv(1) == b"" and service.addresses == ["first"]


def test_a_close_ends_visits_and_those_that_come_later() -> None:
    service = guests()
    with visiting(service, "here") as (sock, thread):
        assert eventually(lambda: service.addresses == ["here"])
        service.close()
        thread.join(10)
        assert sock.recv(1) == b"" and service.here == []
    with visiting(service, "late") as (sock, thread):
        thread.join(10)
        assert sock.recv(1) == b"" and service.here == []
