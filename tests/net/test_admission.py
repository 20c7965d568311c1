from __future__ import annotations

import random
import socket
import threading
import time
from datetime import timedelta

import pytest

from trainfleet.errors import PeerError
from trainfleet.net import admission
from trainfleet.net.address import Address
from trainfleet.net.credentials import Credentials
from trainfleet.net.dial import dial
from trainfleet.net.hello import MAGIC
from trainfleet.net.listener import Listener

pytestmark = pytest.mark.usefixtures("leaves_nothing")
SOON = timedelta(seconds=5)
SECRET = Credentials(secret=b"0123456789abcdef")


def call(address: Address) -> socket.socket:
    return socket.create_connection((address.host, address.port), timeout=5)


def still_admits(listener: Listener, credentials: Credentials) -> None:
    begin = time.monotonic()
    sock = dial(listener.address, credentials=credentials, role="trainer", timeout=SOON)
    listener.accept(SOON).close()
    sock.close()
    assert time.monotonic() - begin < 1, "strangers kept an honest one waiting"


def counted(listener: Listener, count: int) -> None:
    ends = time.monotonic() + 5
    while listener.refused.total() < count and time.monotonic() < ends:
        time.sleep(0.01)
    assert listener.refused.total() == count, listener.refused


def _ended(sock: socket.socket) -> bool:
    try:
        return sock.recv(9) == b""
    except ConnectionError:
        return True


@pytest.mark.parametrize("tls", [False, True])
def test_it_survives_garbage(tls, made):
    chance = random.Random(3)
    credentials = made if tls else SECRET
    with Listener("127.0.0.1:0", credentials=credentials, role="feeder") as listener:
        begins = [b"", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", MAGIC + b"\x00\x40", b"GET / HTTP/1.1\r\n\r\n"]
        for number in range(40):
            with call(listener.address) as sock:
                sock.sendall(begins[number % 4] + chance.randbytes(chance.randint(1, 300)))
        for _ in range(10):
            call(listener.address).close()  # a port scanner
        counted(listener, 50)
        still_admits(listener, credentials)


@pytest.mark.parametrize("tls", [False, True])
def test_silence_and_dribbling_keep_nobody_waiting_and_end_at_the_deadline(tls, made):
    credentials = made if tls else SECRET
    handshake = timedelta(seconds=0.6)
    with Listener("127.0.0.1:0", credentials=credentials, role="feeder", handshake=handshake) as listener:
        silent, dribbling = call(listener.address), call(listener.address)
        begin, ended = time.monotonic(), threading.Event()

        def dribble() -> None:
            words = b"\x16\x03\x01\x02\x00" + bytes(500) if tls else MAGIC + b"\x03\x00" + b" " * 500
            for number in range(len(words)):
                try:
                    dribbling.sendall(words[number : number + 1])
                except OSError:
                    break
                if ended.wait(0.05):
                    break

        thread = threading.Thread(target=dribble)
        thread.start()
        still_admits(listener, credentials)
        assert _ended(silent) and _ended(dribbling)
        assert time.monotonic() - begin < 2.5
        ended.set()
        thread.join()
        silent.close()
        dribbling.close()
        counted(listener, 2)


def test_of_too_many_that_are_pending_the_oldest_ends():
    with Listener("127.0.0.1:0", credentials=SECRET, role="feeder", most_pending=8) as listener:
        silent = [call(listener.address) for _ in range(20)]
        ends = time.monotonic() + 5
        while listener.refused["too many"] < 12 and time.monotonic() < ends:
            time.sleep(0.01)
        assert listener.refused["too many"] == 12
        assert len([thread for thread in threading.enumerate() if thread.name.startswith("greet ")]) <= 9
        still_admits(listener, SECRET)
        assert _ended(silent[0])
        begin = time.monotonic()
        listener.close()
        assert time.monotonic() - begin < 3, "closing waited for those who say nothing"
        for sock in silent:
            sock.close()


def test_admitted_ones_that_nobody_takes_are_bounded(monkeypatch):
    monkeypatch.setattr(admission, "_MOST_READY", 3)
    with Listener("127.0.0.1:0", role="feeder") as listener:
        socks = [dial(listener.address, role="trainer", timeout=SOON) for _ in range(5)]
        counted(listener, 2)
        assert listener.refused == {"not taken": 2}
        for sock in socks:
            sock.close()


def test_wrong_secrets_are_answered_slowly(monkeypatch):
    monkeypatch.setattr(admission, "_SLOW_SECONDS", 0.4)
    with Listener("127.0.0.1:0", credentials=SECRET, role="feeder") as listener:
        begin = time.monotonic()
        with pytest.raises(PeerError):
            dial(listener.address, credentials=Credentials(secret=b"f" * 16), role="trainer", timeout=SOON)
        assert 0.4 <= time.monotonic() - begin < 2
