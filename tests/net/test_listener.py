from __future__ import annotations

import os
import socket
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest

from trainfleet.errors import ConfigError, PeerError
from trainfleet.net.credentials import Credentials
from trainfleet.net.dial import dial
from trainfleet.net.listener import Listener

pytestmark = pytest.mark.usefixtures("leaves_nothing")
SOON = timedelta(seconds=5)
SECRET = Credentials(secret=b"0123456789abcdef")


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


def test_port_0_takes_a_free_one_and_says_which():
    with Listener("127.0.0.1:0", role="feeder") as listener:
        assert listener.address.port > 0
        with pytest.raises(ConfigError, match=f"Port {listener.address.port} of this host is in use") as raised:
            Listener(listener.address, role="feeder")
        assert "0 takes one that is free" in str(raised.value.hint)
    Listener(listener.address, role="feeder").close()  # free again at once


@pytest.mark.parametrize(
    ("address", "fact"),
    [
        ("no.such.host.invalid:0", "does not know the name"),
        ("0.0.0.0:0", "anyone could connect"),
        ("[::]:0", "anyone could connect"),
    ],
)
def test_where_it_cannot_or_must_not_listen_is_a_sentence(address, fact):
    for credentials in (Credentials(), SECRET):
        with pytest.raises(ConfigError, match=fact):
            Listener(address, credentials=credentials, role="feeder")


def test_an_address_of_another_host_is_a_sentence(made):
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1 is not an address of this host"):
        Listener("192.0.2.1:0", credentials=made, role="feeder")


def test_waiting_for_nobody_ends_at_the_timeout_and_at_the_close():
    listener = Listener("127.0.0.1:0", role="feeder")
    with pytest.raises(TimeoutError, match=r"Nobody connected to 127\.0\.0\.1:\d+ within 0\.1 s"):
        listener.accept(timedelta(seconds=0.1))
    timer = threading.Timer(0.1, listener.close)
    timer.start()
    begin = time.monotonic()
    with pytest.raises(PeerError, match="is closed"):
        listener.accept(timedelta(seconds=30))
    assert time.monotonic() - begin < 5
    timer.join()
    listener.close()
    with pytest.raises(PeerError, match="is closed"):
        listener.accept(timedelta(seconds=30))


def test_connections_that_were_taken_outlive_the_listener_and_others_do_not():
    with Listener("127.0.0.1:0", role="feeder") as listener:
        kept, dropped = (dial(listener.address, role="trainer", timeout=SOON) for _ in range(2))
        taken = listener.accept(SOON)
        ours = kept if taken.getpeername() == kept.getsockname() else dropped
        other = dropped if ours is kept else kept
    other.settimeout(5)
    with taken, ours, other:
        taken.sendall(b"still")
        assert ours.recv(9) == b"still"
        assert _ended(other)


def test_without_descriptors_it_waits_and_then_goes_on(caplog):
    resource = pytest.importorskip("resource", reason="only Unix limits descriptors")
    with Listener("127.0.0.1:0", role="feeder") as listener:
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        with socket.socket() as sock:
            used = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
            resource.setrlimit(resource.RLIMIT_NOFILE, (used + 1, before[1]))
            try:
                filling = []
                try:
                    while True:
                        filling.append(os.dup(0))
                except OSError:
                    pass
                sock.settimeout(5)
                sock.connect((listener.address.host, listener.address.port))
                counted(listener, 1)
            finally:
                for fd in filling:
                    os.close(fd)
                resource.setrlimit(resource.RLIMIT_NOFILE, before)
        ends = time.monotonic() + 5
        while not caplog.messages and time.monotonic() < ends:  # it is counted first, and said then
            time.sleep(0.01)
        assert "ulimit -n" in caplog.messages[0]
        sock = dial(listener.address, role="trainer", timeout=SOON)
        listener.accept(SOON).close()
        sock.close()
