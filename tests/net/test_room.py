from __future__ import annotations

import socket
import ssl
import threading
import time

import pytest

from trainfleet.errors import ConfigError
from trainfleet.net.address import Address
from trainfleet.net.credentials import Credentials
from trainfleet.net.dial import connect_through
from trainfleet.net.room import room_of, without_tls
from trainfleet.net.tls import pinned_context
from trainfleet.net.token import Token

SECRET = b"0123456789abcdef"


def test_a_room_is_named_by_the_secret_and_does_not_tell_it():
    assert room_of(SECRET) == room_of(SECRET) != room_of(SECRET[::-1])
    assert len(room_of(SECRET)) == 64 and SECRET.hex() not in room_of(SECRET)


def test_after_tls_has_ended_no_byte_of_what_follows_is_lost(made):
    """The other side speaks at once, in the same segment as the end of its TLS if the kernel likes."""
    context = made.server_context()
    for _ in range(20):
        here, there = socket.socketpair()
        ends = time.monotonic() + 5

        def serve(there: socket.socket = there, ends: float = ends) -> None:
            plain = without_tls(context.wrap_socket(there, server_side=True), ends)
            plain.sendall(b"the first words after")
            plain.close()

        thread = threading.Thread(target=serve)
        thread.start()
        plain = without_tls(pinned_context().wrap_socket(here, server_hostname="x"), ends)
        assert not isinstance(plain, ssl.SSLSocket)
        plain.settimeout(5)
        with plain:
            got = b""
            while chunk := plain.recv(4):
                got += chunk
        assert got == b"the first words after"
        thread.join()


def test_without_a_secret_and_tls_there_is_no_way_through_a_relay():
    via = Token.make(["relay.example"], fingerprint=bytes(32))
    for credentials in (Credentials(), Credentials(secret=SECRET)):
        with pytest.raises(ConfigError, match="needs a token"):
            connect_through(via, credentials, role="trainer", admits=None, ends=time.monotonic() + 1)
    assert via.addresses == (Address("relay.example"),)
