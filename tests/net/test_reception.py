"""A reception lets guests in, calls those that listen, answers doctors, and leaves nobody behind."""

from __future__ import annotations

import socket
import threading
from datetime import timedelta

import pytest
from left_behind import nothing_left_behind

from trainfleet.errors import ConfigError, DependencyError, NotAdmitted
from trainfleet.net.dial import dial, peer_of
from trainfleet.net.listener import Listener
from trainfleet.net.probe import Probe
from trainfleet.net.reception import Reception

FREE = "127.0.0.1:0"
SOON = timedelta(seconds=10)


class Echo:
    """Says back the first byte of each guest, and ends."""

    def __init__(self, **ways):
        self.attended: list[str] = []
        self.reception = Reception(self.attend, role="echo", guest="caller", **ways)

    def attend(self, sock: socket.socket) -> None:
        with sock:
            self.attended.append(threading.current_thread().name)
            sock.sendall(sock.recv(1))


@pytest.fixture
def echo():
    with nothing_left_behind():
        made = Echo(address=FREE)
        made.reception.open()
        yield made
        made.reception.close()
        made.reception.close()


def asked(sock: socket.socket) -> bytes:
    with sock:
        sock.settimeout(10)
        sock.sendall(b"x")
        return sock.recv(1)


def test_each_guest_is_attended_on_a_thread_of_its_own(echo):
    socks = [dial(echo.reception.address, role="caller", timeout=SOON) for _ in range(3)]
    assert [asked(sock) for sock in socks] == [b"x"] * 3
    assert echo.attended == ["trainfleet-echo"] * 3


def test_a_doctor_is_answered_and_a_stranger_is_not_let_in(echo):
    with dial(echo.reception.address, role="doctor", timeout=SOON) as sock:
        assert Probe(sock, "echo").round_trips(count=3).median < 1
        echo.reception.stop()
        assert sock.recv(1) == b"", "its end is that of the reception"
    with Listener(FREE, role="echo", admits=("caller",)) as listener, pytest.raises(NotAdmitted):
        dial(listener.address, role="stranger", timeout=SOON)
    assert echo.attended == []


def test_a_guest_that_listens_is_called_again_when_it_comes_back():
    with Listener(FREE, role="free") as free:
        place = str(free.address)
    with nothing_left_behind():
        echo = Echo(address=None, dials=[place])
        echo.reception.open()
        for _ in range(2):
            with Listener(place, role="caller", admits=("echo",)) as listener:
                sock = listener.accept(SOON)
                assert peer_of(sock).role == "echo" and asked(sock) == b"x"
        echo.reception.close()


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="A echo needs an address to listen at, a relay, or callers"):
        Echo(address=None)
    with pytest.raises(ConfigError, match="does not listen"):
        Echo(address=FREE).reception.address  # noqa: B018
    with pytest.raises(ConfigError, match="credentials"):
        Echo(address="0.0.0.0:0").reception.open()


def test_a_way_that_needs_a_program_is_refused_before_anything_opens(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with nothing_left_behind():
        echo = Echo(address=FREE, dials=["one-two.trycloudflare.com:443"])
        with pytest.raises(DependencyError, match="no cloudflared on this host") as raised:
            echo.reception.open()
        assert "Install it on both sides" in str(raised.value.hint)
        echo.reception.close()
