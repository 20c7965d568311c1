from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainfleet.errors import PeerError
from trainfleet.net.link import Link
from trainfleet.net.probe import Probe, answer_probe

SHORT = timedelta(milliseconds=200)


class Answering:
    """A server that answers probes."""

    def __init__(self, **limits) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        self._limits = limits
        self.ended = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        try:
            sock, _ = self._server.accept()
        except OSError:
            return
        answer_probe(sock, **self._limits)
        self.ended.set()

    def close(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()


@contextmanager
def probing(*, through: dict | None = None, timeout: timedelta = timedelta(seconds=20), **limits) -> Iterator[Probe]:
    server = Answering(**limits)
    host, port = server.address.split(":")
    link = Link(server.address, **through) if through is not None else None
    try:
        with socket.create_connection(link.address if link else (host, int(port))) as sock:
            yield Probe(sock, "cpu-0:7700", timeout=timeout)
        assert server.ended.wait(5), "who answers hears of the end"
    finally:
        if link:
            link.close()
        server.close()


def test_a_connection_on_this_host_is_near_and_wide_and_its_clock_is_ours():
    with probing() as probe:
        trips = probe.round_trips()
        assert 0 < trips.fastest <= trips.median <= trips.slowest < 1
        assert abs(trips.clock_ahead) < 0.25
        assert probe.bytes_per_second_up(lasts=SHORT) > 10e6
        assert probe.bytes_per_second_down(lasts=SHORT) > 10e6
        assert probe.round_trips(count=1).median > 0, "it goes on after the others"


def test_delay_and_rates_of_a_link_are_found():
    with probing(through={"delay": "15ms", "rate_up": "20mbit", "rate_down": "40mbit"}) as probe:
        found = probe.round_trips(count=5)
        assert 0.030 <= found.fastest < 0.060 and found.fastest <= found.median <= found.slowest
        for rate, measure in ((20e6, probe.bytes_per_second_up), (40e6, probe.bytes_per_second_down)):
            # A busy host holds up some.
            assert any(abs(measure(lasts=SHORT) * 8 - rate) < 0.1 * rate for _ in range(8))


def test_the_difference_of_clocks_is_found(monkeypatch):
    real = time.time

    def clock() -> float:
        ours = threading.current_thread() is threading.main_thread()
        return real() + (0 if ours else 7.5)

    monkeypatch.setattr(time, "time", clock)
    with probing(through={"delay": "5ms"}) as probe:
        assert probe.round_trips(count=5).clock_ahead == pytest.approx(7.5, abs=0.25)


def test_round_trips_end_after_their_time():
    with probing(through={"delay": "100ms"}) as probe:
        begin = time.monotonic()
        probe.round_trips(count=100, lasts=timedelta(milliseconds=300))
        assert time.monotonic() - begin < 5, "a hundred take 20 s"


def test_who_answers_sends_and_takes_no_more_than_its_limit():
    ended = pytest.raises(PeerError, match="cpu-0:7700 has admitted us, but ends the probe")
    with probing(most_bytes=1 << 20) as probe, ended:
        probe.bytes_per_second_down()


def test_who_answers_ends_when_its_time_is_over():
    with probing(lasts=timedelta(milliseconds=100)) as probe:
        time.sleep(0.2)
        with pytest.raises(PeerError, match="ends the probe"):
            probe.round_trips()


def test_no_answer_is_said_when_the_time_is_over():
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.create_connection(silent.getsockname()) as sock:
        probe = Probe(sock, "cpu-0:7700", timeout=timedelta(milliseconds=100))
        with pytest.raises(PeerError, match="does not answer the probe in time"):
            probe.round_trips()


@pytest.mark.parametrize(
    "answer, words",
    [
        (struct.pack("!4sQd", b"HTTP", 0, 1.0), "answers the probe with something else"),
        (struct.pack("!4sQd", b"tfpr", 5, 1.0), "answers another question"),
        (struct.pack("!4sQd", b"tfpr", 0, float("nan")), "answers the probe with something else"),
    ],
)
def test_an_answer_that_cannot_be_is_refused(answer, words):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as sock:
        accepted, _ = server.accept()
        with accepted:
            accepted.sendall(answer)
            with pytest.raises(PeerError, match=words):
                Probe(sock, "cpu-0:7700").round_trips(count=1)


@settings(max_examples=200)
@given(st.binary(max_size=64), st.sampled_from([b"", b"tfpr", b"tfpr\1", b"tfpr\2", b"tfpr\3", b"tfpr\3" + bytes(6)]))
def test_whatever_is_asked_ends_the_answers_and_raises_nothing(words, begin):
    near, far = socket.socketpair()
    with near, far:
        near.sendall(begin + words)
        near.shutdown(socket.SHUT_WR)
        reader = threading.Thread(target=drain, args=(near,), daemon=True)
        reader.start()
        answer_probe(far, lasts=timedelta(seconds=2), most_bytes=1 << 20)
        reader.join(2)
        assert not reader.is_alive()


def drain(sock: socket.socket) -> None:
    with suppress(OSError):
        while sock.recv(1 << 16):
            pass
