"""Who is here is known, why others are not is said, and a wait for them ends."""

from __future__ import annotations

import threading
import time
from datetime import timedelta

import pytest
from left_behind import nothing_left_behind

from trainfleet.errors import ConfigError, DataError, NotAdmitted, PeerError
from trainfleet.net.dial import dial
from trainfleet.net.listener import Listener
from trainfleet.net.peers import Peers, Ways

FREE = "127.0.0.1:0"
SOON = timedelta(seconds=5)


class Known:
    """Connects once on a thread of its own, and is here until it is closed."""

    def __init__(self, name, connect, again, peers):
        self.name, self.again, self.peers, self.sock, self.words = name, again, peers, None, []
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(connect,), daemon=True)
        self._thread.start()

    def _run(self, connect):
        try:
            self.sock = connect(timedelta(days=1), self._closing)
            self.peers.joined(self.name)
        except PeerError as exc:
            self.peers.given_up(self.name, exc)

    def say_bye(self):
        self._closing.set()
        self.words.append("bye")

    def close(self):
        self._thread.join(5)
        if self.sock is not None:
            self.sock.close()

    def join(self, seconds):
        self._thread.join(seconds)

    @property
    def is_alive(self):
        return not self._closing.is_set()


@pytest.fixture
def opened():
    with nothing_left_behind():
        made = []

        def start(seconds=1.0, **ways):
            peers = Peers(
                Ways(**ways),
                lambda name, connect, again: Known(name, connect, again, peers),
                role="client",
                admits="service",
                timeout=timedelta(seconds=seconds),
                remedy="Start one.",
            )
            made.append(peers)
            peers.open()
            return peers

        yield start
        for peers in made:
            peers.close()
            assert all("bye" in member.words for member in peers.members)


def test_those_that_are_called_and_those_that_call_are_members(opened):
    with Listener(FREE, role="service") as listener:
        peers = opened(places=[listener.address])
        listener.accept(SOON).close()
        peers.wait(lambda: peers.members[0].sock is not None, "it")
        assert peers.members[0].again and peers.address is None
    peers = opened(listen=FREE)
    for number in range(2):
        dial(peers.address, role="service", timeout=SOON).close()
        peers.wait(lambda number=number: len(peers.members) > number, "them")
    assert not peers.members[0].again
    with pytest.raises(NotAdmitted):
        dial(peers.address, role="trainer", timeout=SOON)


def test_a_wait_ends_with_the_reason_of_each(opened):
    with Listener(FREE, role="service") as free:
        gone = str(free.address)
    peers, asked = opened(0.6, places=[gone]), []
    begun = time.monotonic()
    with pytest.raises(PeerError, match=r"0.6 s for an answer, and no service was there. .*the port is closed") as end:
        peers.wait(lambda: False, "an answer", lambda: asked.append(1))
    assert time.monotonic() - begun < 3 and asked and end.value.hint == "Start one."


def test_one_that_comes_further_is_waited_for_and_one_that_does_not_is_not(opened):
    peers, stop = opened(0.6, listen=FREE), threading.Event()
    peers.joined("one")

    def say_alive():
        for number in range(100):
            peers.alive("one", min(number, 10))
            if stop.wait(0.1):
                return

    speaker = threading.Thread(target=say_alive)
    speaker.start()
    begun = time.monotonic()
    with pytest.raises(PeerError, match="the 1 that are here made no progress"):
        peers.wait(lambda: False, "an answer")
    assert time.monotonic() - begun > 1.3
    stop.set()
    speaker.join()


def test_the_loss_of_one_is_no_end_and_that_of_the_last_is(opened):
    with Listener(FREE, role="service") as one, Listener(FREE, role="service") as other:
        peers = opened(places=[one.address, other.address])
        peers.given_up("one", NotAdmitted("wrong token"))
        peers.wait(lambda: True, "it")
        peers.left("other", PeerError("cut"))
        assert peers.lost == 1
        peers.given_up("other", NotAdmitted("other weights"))
        with pytest.raises(NotAdmitted, match="other weights"):
            peers.wait(lambda: False, "it")


def test_what_would_come_again_ends_the_wait_at_once(opened):
    peers = opened(60, listen=FREE)
    peers.given_up("one", DataError("a Pair may not be built"))
    with pytest.raises(DataError, match="Pair"):
        peers.wait(lambda: False, "it")


def test_an_address_that_cannot_be_is_refused(opened):
    with Listener(FREE, role="other") as taken, pytest.raises(ConfigError, match="in use"):
        opened(listen=taken.address)
