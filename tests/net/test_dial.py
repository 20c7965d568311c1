from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import pytest
from certificates import issue

from trainfleet.errors import ConfigError, NotAdmitted, PeerError
from trainfleet.net import admission
from trainfleet.net.credentials import Credentials
from trainfleet.net.dial import dial, peer_of
from trainfleet.net.listener import Listener
from trainfleet.net.token import Token

pytestmark = pytest.mark.usefixtures("leaves_nothing")
SECRET = b"0123456789abcdef"
SOON = timedelta(seconds=5)


@pytest.fixture(autouse=True)
def quick_refusals(monkeypatch) -> None:
    monkeypatch.setattr(admission, "_SLOW_SECONDS", 0.1)


def exchange(listener: Listener, sock: socket.socket) -> None:
    taken = listener.accept(SOON)
    with sock, taken:
        assert sock.gettimeout() is None and taken.gettimeout() is None
        sock.sendall(b"a batch, please")
        assert taken.recv(100) == b"a batch, please"
        taken.sendall(b"here")
        assert sock.recv(100) == b"here"
        assert (peer_of(sock).role, peer_of(taken).role) == ("feeder", "trainer")
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert taken.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize("secret", [None, SECRET])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_on_loopback_a_plain_connection_with_or_without_a_secret(host, secret):
    if host == "[::1]" and not _has_ipv6():
        pytest.skip("this host has no ::1")
    credentials = Credentials(secret=secret)
    with Listener(f"{host}:0", credentials=credentials, role="feeder") as listener:
        sock = dial(listener.address, credentials=credentials, role="trainer", timeout=SOON)
        assert not isinstance(sock, ssl.SSLSocket) and peer_of(sock).proved is (secret is not None)
        exchange(listener, sock)


def _has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def test_a_token_is_all_that_the_dialler_needs(made):
    with Listener("0.0.0.0:0", credentials=made, role="feeder") as listener:
        text = str(listener.token([f"127.0.0.1:{listener.address.port}"]))
        sock = dial(text, role="trainer", timeout=SOON)
        assert isinstance(sock, ssl.SSLSocket) and sock.version() == "TLSv1.3" and peer_of(sock).proved
        exchange(listener, sock)


def test_a_token_of_all_interfaces_names_one_that_can_be_dialled(made):
    with Listener("0.0.0.0:0", credentials=made, role="feeder") as listener:
        token = listener.token()
        assert all(address.host not in ("0.0.0.0", "::") for address in token.addresses)
        exchange(listener, dial(token, role="trainer", timeout=SOON))


def test_the_credentials_of_a_token_go_before_those_given(made):
    with Listener("127.0.0.1:0", credentials=made, role="feeder") as listener:
        others = Credentials(secret=SECRET)
        exchange(listener, dial(listener.token(), credentials=others, role="trainer", timeout=SOON))


def test_of_several_addresses_the_one_that_answers_is_taken(made):
    with closed_port() as closed, Listener("127.0.0.1:0", credentials=made, role="feeder") as listener:
        exchange(listener, dial(listener.token([closed, listener.address]), role="trainer", timeout=SOON))


def test_many_dial_at_once(made):
    with Listener("127.0.0.1:0", credentials=made, role="feeder") as listener:
        token, socks = listener.token(), []
        threads = [
            threading.Thread(target=lambda: socks.append(dial(token, role="trainer", timeout=SOON))) for _ in range(24)
        ]
        for thread in threads:
            thread.start()
        taken = [listener.accept(SOON) for _ in threads]
        for thread in threads:
            thread.join()
        assert len({sock.getpeername() for sock in taken} & {sock.getsockname() for sock in socks}) == 24
        for sock in socks + taken:
            sock.close()
        assert not listener.refused


def test_who_dials_first_waits_for_who_listens_later():
    with closed_port() as place:
        found: list[socket.socket] = []
        thread = threading.Thread(target=lambda: found.append(dial(place, role="trainer", timeout=SOON)))
        thread.start()
        time.sleep(0.2)
    with Listener(place, role="feeder") as listener:
        thread.join()
        exchange(listener, found[0])


@contextmanager
def closed_port() -> Iterator[str]:
    """An address at which nothing listens, and nobody else will while it is held."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{sock.getsockname()[1]}"


def counted(listener: Listener, counts: dict[str, int]) -> None:
    """Wait until the listener, which may close a moment after us, has counted these."""
    ends = time.monotonic() + 5
    while listener.refused != counts and time.monotonic() < ends:
        time.sleep(0.01)
    assert listener.refused == counts


def refused(to: object, **others: object) -> str:
    """What `dial` says in refusing at once."""
    begin = time.monotonic()
    with pytest.raises(NotAdmitted) as raised:
        dial(to, **({"role": "trainer", "timeout": timedelta(seconds=20)} | others))  # type: ignore[arg-type]
    assert time.monotonic() - begin < 3, "it was tried again"
    return str(raised.value)


def test_a_wrong_secret_is_refused_on_both_sides_and_not_tried_again(made, caplog):
    with Listener("127.0.0.1:0", credentials=made, role="feeder") as listener:
        token = listener.token()
        other = Token.make(token.addresses, fingerprint=token.fingerprint)
        for _ in range(2):
            assert "our secret is not its own" in refused(other)
        counted(listener, {"not admitted": 2})
        (line,) = caplog.messages
        assert "does not know our secret. Further ones from 127.0.0.1 are only counted." in line
        exchange(listener, dial(token, role="trainer", timeout=SOON))


def test_another_certificate_is_refused_before_a_word_is_said(made):
    with Listener("127.0.0.1:0", credentials=made, role="feeder") as listener:
        token = listener.token()
        other = Token.make(token.addresses, secret=token.secret, fingerprint=bytes(32))
        assert "but the token says 0000" in refused(other)
        with pytest.raises(TimeoutError):
            listener.accept(timedelta(seconds=0.1))
        assert listener.refused.total() == 1


def test_plain_at_a_port_of_tls_and_tls_at_a_plain_port_are_said(made):
    with Listener("127.0.0.1:0", credentials=made, role="feeder") as listener:
        assert "wants TLS" in refused(listener.address)
        counted(listener, {"not admitted": 1})
    with Listener("127.0.0.1:0", role="feeder") as listener:
        assert "does not speak TLS" in refused(made.token([listener.address]))
        counted(listener, {"not admitted": 1})


def test_other_roles_are_refused():
    with Listener("127.0.0.1:0", role="feeder", admits={"trainer", "doctor"}) as listener:
        assert "does not talk to our role" in refused(listener.address, role="viewer")
        assert "is a feeder; we, a trainer, talk to a gpu-service" in refused(listener.address, admits={"gpu-service"})
        exchange(listener, dial(listener.address, role="trainer", timeout=SOON))


def test_certificates_of_a_ca_admit_without_a_secret(tmp_path):
    pytest.importorskip("cryptography", reason="certificates need the extra `net`")
    for authority in ("ca", "other"):
        issue(tmp_path, authority, ca=None)
    names = {"server": ("ca", 30), "client": ("ca", 30), "stranger": ("other", 30), "late": ("ca", -1)}
    files = {name: issue(tmp_path, name, ca=ca, days=(-30, days)) for name, (ca, days) in names.items()}
    with Listener("127.0.0.1:0", credentials=Credentials(certificates=files["server"]), role="feeder") as listener:
        client = Credentials(certificates=files["client"])
        sock = dial(listener.address, credentials=client, role="trainer", timeout=SOON)
        assert peer_of(sock).proved
        exchange(listener, sock)
        late = Credentials(certificates=files["late"])
        assert "refuses our certificate" in refused(listener.address, credentials=late)
        stranger = Credentials(certificates=files["stranger"])
        assert "does not hold" in refused(listener.address, credentials=stranger)
        counted(listener, {"not admitted": 2})


def test_nothing_listens_there_is_said_after_the_budget():
    with closed_port() as place, pytest.raises(PeerError, match=rf"{place} could not be reached within 0\.3 s.*closed"):
        dial(place, role="trainer", timeout=timedelta(seconds=0.3))


def test_a_name_that_does_not_resolve_is_said():
    credentials = Credentials(secret=SECRET, fingerprint=bytes(32))
    with pytest.raises(PeerError, match="does not know that name"):
        dial("no.such.host.invalid", credentials=credentials, role="trainer", timeout=timedelta(seconds=0.3))


def test_nothing_is_sent_in_plain_to_another_host():
    with pytest.raises(ConfigError, match="no credentials for cpu-0:7700"):
        dial("cpu-0", credentials=Credentials(secret=SECRET), role="trainer", timeout=SOON)


@contextmanager
def impostor(answer: bytes | None) -> Iterator[str]:
    """A listener that is not of ours: says `answer` to all who come and closes; None: says nothing, and stays."""
    server, kept = socket.create_server(("127.0.0.1", 0)), []

    def serve() -> None:
        while True:
            try:
                sock, _ = server.accept()
            except OSError:
                return
            kept.append(sock)
            if answer is not None:
                with sock, suppress(ConnectionError):  # who came may have hung up already
                    sock.sendall(answer)
                    sock.recv(4096)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"127.0.0.1:{server.getsockname()[1]}"
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join()
        for sock in kept:
            sock.close()


@pytest.mark.parametrize("answer", [b"SSH-2.0-OpenSSH_9.7\r\n", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\0" * 5000])
def test_another_program_at_the_port_is_said(answer, made):
    with impostor(answer) as place:
        with pytest.raises(PeerError, match="does not speak like trainfleet"):
            dial(place, role="trainer", timeout=timedelta(seconds=0.3))
        assert "does not speak TLS" in refused(made.token([place]))


@pytest.mark.parametrize("tls", [False, True])
def test_a_listener_that_says_nothing_ends_at_the_deadline(tls, made):
    with impostor(None) as place:
        begin = time.monotonic()
        with pytest.raises(PeerError, match="was reached, but did not answer in time"):
            dial(made.token([place]) if tls else place, role="trainer", timeout=timedelta(seconds=0.3))
        assert time.monotonic() - begin < 1


def test_closing_ends_a_dial():
    closing = threading.Event()
    closing.set()
    with closed_port() as place, pytest.raises(PeerError, match="closed"):
        dial(place, role="trainer", timeout=timedelta(seconds=30), closing=closing)
