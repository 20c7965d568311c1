"""A way in is opened again when its program ends; ssh is the real client against a real server of the protocol."""

from __future__ import annotations

import os
import signal
import threading
import time
from datetime import timedelta

import psutil
import pytest
from ssh_host import ssh_in_path

from trainfleet.errors import ConfigError, PeerError
from trainfleet.net.address import Address
from trainfleet.net.dial import dial
from trainfleet.net.entrance import Entrance, Way
from trainfleet.net.listener import Listener
from trainfleet.net.tunnel import Tunnel

pytestmark = pytest.mark.usefixtures("leaves_nothing")

SOON = timedelta(seconds=10)


@pytest.mark.parametrize(
    ("text", "way"),
    [
        ("ngrok", Way("ngrok")),
        (" cloudflared\n", Way("cloudflared")),
        ("ssh:me@example.org", Way("ssh", "me@example.org")),
        ("ssh:me@example.org:2222", Way("ssh", "me@example.org", 2222)),
        ("ssh-at:gpu", Way("ssh", "gpu", at_host=True)),
        ("ssh:me@[::1]:2222", Way("ssh", "me@::1", 2222)),
    ],
)
def test_a_way_is_written_in_one_word(text, way):
    assert Way.parse(text) == way


@pytest.mark.parametrize("text", ["", "frp", "ssh", "ssh:", "ngrok:7700", "ssh:-oProxyCommand=rm", "ssh:me@host:port"])
def test_what_is_no_way_is_refused(text):
    with pytest.raises(ConfigError):
        Way.parse(text)


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children()}


def test_a_way_by_ssh_that_ends_is_open_again_at_the_same_place(tmp_path, made, monkeypatch, caplog):
    caplog.set_level("INFO", "trainfleet")
    with (
        ssh_in_path(tmp_path) as environment,
        Listener("127.0.0.1:0", credentials=made, role="feeder") as listener,
    ):
        monkeypatch.setenv("PATH", environment["PATH"])
        before = children()
        with Entrance("ssh:me@127.0.0.1", listener.address.port, moved=lambda place: pytest.fail(str(place))) as way:
            token = str(listener.token([way.address]))
            for _ in range(2):
                near = dial(token, role="trainer", timeout=SOON)
                with near, listener.accept(SOON) as far:
                    near.sendall(b"x")
                    assert far.recv(1) == b"x"
                    programs = children() - before
                    for pid in programs:
                        os.kill(pid, signal.SIGKILL)
                    assert len(programs) == 1 and near.recv(1) == b"", "it went through the program that was killed"
        assert children() - before == set()
    assert "is open again at" in caplog.text and "the token is as before" in caplog.text


def test_a_way_that_has_to_move_says_where_to(monkeypatch, caplog):
    opened = []

    def open_tunnel(kind, port, **_):
        if len(opened) == 1:
            opened.append(None)
            raise PeerError("no network")
        ended = threading.Event()
        opened.append(ended)
        return Tunnel(Address(f"{len(opened)}.example.org"), ended.set, lambda: not ended.is_set())

    monkeypatch.setattr("trainfleet.net.entrance.open_tunnel", open_tunnel)
    monkeypatch.setattr("trainfleet.net.entrance._LOOK_SECONDS", 0.05)
    told = []
    with Entrance("ngrok", 7700, moved=told.append) as way:
        assert way.address.host == "1.example.org"
        opened[0].set()
        ends = time.monotonic() + 5
        while not told and time.monotonic() < ends:
            time.sleep(0.02)
        assert told == [way.address] and way.address.host == "3.example.org"
    assert opened[-1].is_set(), "closed with the way"
    assert "is not open yet, and is tried again: no network" in caplog.text and "in place of" in caplog.text
