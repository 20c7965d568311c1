from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from trainfleet.errors import ConfigError, PeerError
from trainfleet.net.conditions import Fault
from trainfleet.net.link import Link

OPEN_FILES = Path("/proc/self/fd")


class Echo:
    """Sends back what it gets, on as many connections as come; with `reads=False` it takes nothing."""

    def __init__(self, *, reads: bool = True) -> None:
        self._reads = reads
        self._server = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        self.accepted: list[socket.socket] = []
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._server.accept()
            except OSError:
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.accepted.append(sock)
            if self._reads:
                threading.Thread(target=self._answer, args=(sock,), daemon=True).start()

    @staticmethod
    def _answer(sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := sock.recv(1 << 16):
                sock.sendall(piece)
            sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        for sock in self.accepted:
            sock.close()


@pytest.fixture
def echo() -> Iterator[Echo]:
    echo = Echo()
    yield echo
    echo.close()


def dial(link: Link, *, timeout: float = 5) -> socket.socket:
    sock = socket.create_connection(link.address, timeout=timeout)
    with contextlib.suppress(OSError):  # it may be reset already
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def read(sock: socket.socket, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        piece = sock.recv(count - len(parts))
        if not piece:
            break
        parts += piece
    return bytes(parts)


def await_until(happens: Callable[[], bool]) -> None:
    ends = time.monotonic() + 5
    while not happens():
        assert time.monotonic() < ends, "it did not happen within 5 s"
        time.sleep(0.005)


def answer(sock: socket.socket, words: bytes) -> bytes:
    sock.sendall(words)
    return read(sock, len(words))


def test_bytes_go_through_unchanged_both_ways_and_a_half_close_too(echo):
    words = random.Random(1).randbytes(3_000_000)
    with Link(echo.address, jitter="1ms", seed=1) as link, dial(link) as sock:
        writer = threading.Thread(target=lambda: (sock.sendall(words), sock.shutdown(socket.SHUT_WR)))
        writer.start()
        assert read(sock, len(words) + 1) == words
        writer.join()
        counters = link.counters
        assert (counters.bytes_up, counters.bytes_down) == (len(words), len(words))
        assert (counters.connections, counters.reset, counters.refused) == (1, 0, 0)


def test_the_delay_is_kept_to_about_a_millisecond(echo):
    with Link(echo.address, delay="20ms") as link, dial(link) as sock:
        trips: list[float] = []
        while len(trips) < 5 or (min(trips) > 0.043 and len(trips) < 50):  # a busy host holds up some
            begin = time.monotonic()
            answer(sock, b"x")
            trips.append(time.monotonic() - begin)
        assert 0.04 <= min(trips) < 0.043


@pytest.mark.parametrize("way", ["up", "down"])
def test_the_rate_is_kept_to_a_few_percent(echo, way):
    rate = 20e6
    options = {"rate_up": rate} if way == "up" else {"rate_down": rate}
    rates: list[float] = []
    with Link(echo.address, **options) as link, dial(link) as sock:
        while not rates or (max(rates) < 0.95 * rate and len(rates) < 10):  # a busy host holds up some
            writer = threading.Thread(target=sock.sendall, args=(bytes(500_000),), daemon=True)
            begin = time.monotonic()
            writer.start()
            read(sock, 500_000)
            rates.append(500_000 * 8 / (time.monotonic() - begin))
            writer.join()
    assert 0.95 * rate < max(rates) < 1.02 * rate


def test_connections_share_the_rate_about_evenly(echo):
    with Link(echo.address, rate_up=20e6) as link:
        socks = [dial(link) for _ in range(4)]
        for sock in socks:
            threading.Thread(target=send_until_closed, args=(sock,), daemon=True).start()
        for sock in socks:
            read(sock, 30_000)
        begin = time.monotonic()
        counts = [0] * 4
        while time.monotonic() - begin < 0.5:
            for number, sock in enumerate(socks):
                counts[number] += len(sock.recv(1 << 16))
        seconds = time.monotonic() - begin
        for sock in socks:
            sock.close()
    assert sum(counts) * 8 / seconds < 20e6 * 1.3, "what lay in buffers when the time began comes on top"
    assert min(counts) > 0.5 * max(counts)


def send_until_closed(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            sock.sendall(bytes(10_000))


def test_a_receiver_that_does_not_read_stops_the_sender():
    deaf = Echo(reads=False)
    with Link(deaf.address, rate_up=100e6, delay="5ms") as link, dial(link, timeout=0.5) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        sent = 0
        with pytest.raises(TimeoutError):
            while sent < 100 << 20:
                sent += sock.send(bytes(1 << 16))
        counters = link.counters
    deaf.close()
    assert sent < 16 << 20
    assert counters.most_bytes_under_way < 1 << 20


def test_a_cut_resets_what_is_open_and_what_comes_until_it_is_over(echo):
    with Link(echo.address) as link, dial(link) as before:
        assert answer(before, b"one") == b"one"
        link.cut(0.3)
        with pytest.raises(ConnectionResetError):
            before.recv(1)
        with pytest.raises(ConnectionResetError), dial(link) as during:
            during.recv(1)
        time.sleep(0.35)
        with dial(link) as after:
            assert answer(after, b"two") == b"two"
        assert link.counters.faults == 1 and link.counters.reset == 2


def test_a_gentle_cut_closes_and_restore_ends_it(echo):
    with Link(echo.address) as link, dial(link) as sock:
        answer(sock, b"one")
        link.cut(gently=True)
        assert sock.recv(1) == b""
        link.restore()
        with dial(link) as after:
            assert answer(after, b"two") == b"two"


def test_the_end_of_an_earlier_fault_does_not_end_a_later_one(echo):
    with Link(echo.address) as link:
        link.pause(0.1)
        link.cut()
        time.sleep(0.2)
        with pytest.raises(ConnectionResetError), dial(link) as sock:
            sock.recv(1)


def test_a_half_open_link_is_silent_and_then_resets_who_lost_bytes(echo):
    with Link(echo.address) as link, dial(link) as lost, dial(link) as idle:
        answer(lost, b"one")
        answer(idle, b"one")
        link.half_open()
        lost.sendall(b"two")
        lost.settimeout(0.15)
        with pytest.raises(TimeoutError):
            lost.recv(1)
        with dial(link, timeout=0.1) as newcomer:  # its handshake is the kernel's, its bytes are lost as well
            newcomer.sendall(b"three")
            with pytest.raises(TimeoutError):
                newcomer.recv(1)
        assert len(echo.accepted) == 2, "the target hears nothing of it"
        link.restore()
        assert answer(idle, b"four") == b"four", "it lost nothing"
        lost.sendall(b"five")
        lost.settimeout(5)
        with pytest.raises(ConnectionResetError):
            lost.recv(1)
        assert link.counters.swallowed_bytes == len(b"two") + len(b"three")


def test_what_is_under_way_when_a_link_becomes_half_open_is_lost(echo):
    with Link(echo.address, delay="1s") as link, dial(link, timeout=0.3) as sock:
        sock.sendall(b"late")
        time.sleep(0.05)
        link.half_open()
        with pytest.raises(TimeoutError):
            sock.recv(1)
        assert link.counters.swallowed_bytes == 4 and link.counters.bytes_up == 0


def test_a_pause_keeps_everything_for_afterwards(echo):
    words = random.Random(2).randbytes(2_000_000)
    with Link(echo.address, rate="400mbit") as link, dial(link) as sock:
        answer(sock, b"one")
        writer = threading.Thread(target=sock.sendall, args=(words,))
        writer.start()
        time.sleep(0.005)
        link.pause(0.2)
        begin = time.monotonic()
        assert read(sock, len(words)) == words
        assert time.monotonic() - begin > 0.15
        writer.join()


def test_what_became_due_in_a_pause_comes_when_it_ends(echo):
    with Link(echo.address, delay="30ms") as link, dial(link) as sock:
        sock.sendall(b"under way")
        await_until(lambda: link.counters.most_bytes_under_way == 9)
        link.pause()
        time.sleep(0.1)
        assert link.counters.bytes_up == 0
        link.restore()
        assert read(sock, 9) == b"under way"


def test_corruption_flips_the_same_bits_in_every_run(echo):
    words = bytes(100_000)
    arrived = []
    for seed in (1, 1, 2):
        with Link(echo.address, corruption=1e-3, seed=seed) as link, dial(link) as sock:
            threading.Thread(target=sock.sendall, args=(words,), daemon=True).start()
            arrived.append(read(sock, len(words)))
            flips = link.counters.flipped_bits
            assert flips == pytest.approx(200, rel=0.4) and flips >= sum(b.bit_count() for b in arrived[-1]) > 0
    assert arrived[0] == arrived[1] != arrived[2]


def test_faults_happen_by_themselves_after_bytes_and_after_a_time(echo):
    faults = [Fault.parse("cut", "50ms@100kB"), Fault.parse("pause", "300ms@400ms")]
    with Link(echo.address, faults=faults) as link:
        begin = time.monotonic()
        with dial(link) as sock, pytest.raises(OSError):
            sock.sendall(bytes(200_000))
            if len(read(sock, 200_000)) < 200_000:
                raise ConnectionResetError
        time.sleep(max(0.0, begin + 0.45 - time.monotonic()))
        with dial(link) as sock:
            answer(sock, b"late")
        assert time.monotonic() - begin > 0.65
        assert link.counters.faults == 2


def test_who_resets_is_passed_on_and_so_is_a_target_that_does():
    deaf = Echo(reads=False)
    with Link(deaf.address) as link, dial(link) as sock:
        sock.sendall(b"x")
        await_until(lambda: link.counters.bytes_up == 1 and len(deaf.accepted) == 1)
        deaf.accepted[0].close()  # with a byte unread: the kernel resets
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
    deaf.close()


def test_a_target_that_is_not_there_resets_and_is_counted(caplog):
    caplog.set_level("INFO", "trainfleet")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with Link(f"127.0.0.1:{port}") as link:
        with pytest.raises(ConnectionResetError), dial(link) as sock:
            sock.recv(1)
        assert link.counters.refused == 1
    assert f"Connection 1 is reset: 127.0.0.1:{port} does not answer." in caplog.text


def test_a_target_may_come_later(echo):
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = server.getsockname()
    with Link(f"127.0.0.1:{place[1]}") as link:
        with pytest.raises(ConnectionResetError), dial(link) as sock:
            sock.recv(1)
        with socket.create_server(place) as server, dial(link) as sock:
            sock.sendall(b"x")
            accepted, _ = server.accept()
            assert accepted.recv(1) == b"x"
            accepted.close()


def test_names_that_do_not_resolve_and_ports_in_use_are_said(echo):
    with pytest.raises(PeerError, match=r"The link cannot lead to nowhere\.invalid:7700: this host does"):
        Link("nowhere.invalid:7700")
    with pytest.raises(ConfigError, match=r"The link cannot listen at 127\.0\.0\.1:.*: address already") as caught:
        Link(echo.address, listen=echo.address)
    assert "trainfleet doctor ports" in (caught.value.hint or "")


def test_many_connections_are_one_thread_and_all_are_answered(echo):
    before = threading.active_count()
    with Link(echo.address, delay="2ms") as link:
        assert threading.active_count() == before + 1
        socks = [dial(link) for _ in range(150)]
        for number, sock in enumerate(socks):
            sock.sendall(number.to_bytes(2, "big"))
        assert [int.from_bytes(read(sock, 2), "big") for sock in socks] == list(range(150))
        assert link.counters.open_connections == 150
        for sock in socks:
            sock.close()
        await_until(lambda: link.counters.open_connections == 0)


@pytest.mark.skipif(not OPEN_FILES.is_dir(), reason="needs a system that lists open files in /proc")
def test_it_ends_without_leaving_a_thread_or_a_socket():
    deaf = Echo(reads=False)
    threads, files = set(threading.enumerate()), len(list(OPEN_FILES.iterdir()))
    link = Link(deaf.address, rate="1mbit", delay="1s")
    socks = [dial(link) for _ in range(5)]
    for sock in socks:
        sock.sendall(bytes(50_000))
    await_until(lambda: len(deaf.accepted) == 5)
    link.close()
    link.close()
    assert link.counters.connections == 5, "counters outlive it"
    for sock in socks:
        sock.close()
    with pytest.raises(ConnectionRefusedError):
        dial(link)
    assert set(threading.enumerate()) == threads
    for sock in deaf.accepted:
        sock.close()
    assert len(list(OPEN_FILES.iterdir())) == files
    deaf.close()


def test_a_preset_far_away_feels_far_away(echo):
    with Link(echo.address, preset="transatlantic") as link, dial(link) as sock:
        begin = time.monotonic()
        answer(sock, b"x")
        assert time.monotonic() - begin >= 0.088
    assert link.conditions.delay == timedelta(milliseconds=44)


def test_a_lossy_link_is_late_and_changes_nothing(echo):
    words = random.Random(5).randbytes(300_000)
    with Link(echo.address, delay="5ms", loss=0.02, rate="50mbit", seed=3) as link, dial(link) as sock:
        threading.Thread(target=sock.sendall, args=(words,), daemon=True).start()
        assert read(sock, len(words)) == words
        assert link.counters.lost_segments > 2
