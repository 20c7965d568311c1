"""A service is ready before anybody comes, and gives everything up, also where it could not begin."""

from __future__ import annotations

import socket
from contextlib import closing, suppress
from datetime import timedelta

import pytest
from left_behind import nothing_left_behind

from trainfleet.errors import ConfigError
from trainfleet.net.dial import dial
from trainfleet.net.guests import Guests
from trainfleet.net.listener import Listener
from trainfleet.net.reception import Reception
from trainfleet.net.service import Service

FREE = "127.0.0.1:0"


class Echo(Service[socket.socket]):
    """Says each byte back."""

    def __init__(self, address: str = FREE, *, fails: bool = False) -> None:
        guests = Guests(lambda sock: sock, self._say_back, lambda sock: (1,), name="Caller")
        super().__init__(guests, Reception(guests.meet, role="echo", guest="caller", address=address))
        self.happened: list[str] = []
        self._fails = fails

    def _begin(self) -> None:
        self.happened.append("begin")
        assert self.listener is None, "nobody can come yet"
        if self._fails:
            raise ConfigError("There is nothing to echo with.")

    def _end(self) -> None:
        self.happened.append("end")
        assert self.guests.here == [] or self.reception.closing.is_set()

    def _say_back(self, sock: socket.socket) -> None:
        with closing(sock), suppress(OSError):  # the service closes it, maybe in the midst of a word
            while word := sock.recv(1):
                sock.sendall(word)


def test_it_serves_between_open_and_close() -> None:
    with nothing_left_behind():
        with Echo().open() as echo:
            assert echo.listener is not None and echo.listener.address == echo.address
            with dial(echo.address, role="caller", timeout=timedelta(seconds=10)) as sock:
                sock.sendall(b"x")
                assert sock.recv(1) == b"x"
        echo.close()
    assert echo.happened == ["begin", "end", "end"]


def test_what_cannot_begin_leaves_nothing() -> None:
    with nothing_left_behind():
        echo = Echo(fails=True)
        with pytest.raises(ConfigError, match="nothing to echo"):
            echo.open()
        with Listener(FREE, role="other") as other:
            late = Echo(str(other.address))
            with pytest.raises(ConfigError, match="in use"):
                late.open()
    assert echo.happened == late.happened == ["begin", "end"]
