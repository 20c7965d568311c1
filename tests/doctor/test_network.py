from __future__ import annotations

import json
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime, timedelta, timezone

import pytest
from certificates import issue

from trainfleet.cli.main import main
from trainfleet.doctor import network
from trainfleet.net import hello
from trainfleet.net.credentials import Credentials
from trainfleet.net.link import Link
from trainfleet.net.listener import Listener
from trainfleet.net.probe import answer_probe

LOCAL = "127.0.0.1:0"


@pytest.fixture(scope="module")
def made() -> Credentials:
    pytest.importorskip("cryptography", reason="identities need the extra `net`")
    return Credentials.make()


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    monkeypatch.setattr(network, "CONNECT_SECONDS", 2.0)
    monkeypatch.setattr(network, "RATE", timedelta(milliseconds=100))


@contextmanager
def feeding(credentials: Credentials, *, answers: bool = True, admits=("trainer", "doctor")) -> Iterator[Listener]:
    """A listener that answers doctors, as a feeder does."""
    with Listener(LOCAL, credentials=credentials, role="feeder", admits=admits) as listener:

        def serve() -> None:
            while True:
                try:
                    sock = listener.accept(timedelta(seconds=20))
                except Exception:
                    return
                answer_probe(sock) if answers else sock.close()

        server = threading.Thread(target=serve, daemon=True)
        server.start()
        yield listener
    server.join(5)
    assert not server.is_alive()


@contextmanager
def speaking(say: Callable[[socket.socket], None]) -> Iterator[str]:
    """Another program at a port: its address."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    sock, _ = server.accept()
                except OSError:
                    return
                with sock, suppress(OSError):
                    say(sock)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
    thread.join(5)


def doctor(capsys, *arguments: str) -> tuple[int, dict[str, dict[str, str]]]:
    """The exit code, and the findings by subject."""
    with pytest.raises(SystemExit) as ended:
        main(["doctor", *arguments, "--json"])
    findings = json.loads(capsys.readouterr().out)
    return int(ended.value.code or 0), {finding["subject"]: finding for finding in findings}


STEPS = ["name", "TCP", "TLS", "admission", "version", "round trip", "rate up", "rate down", "clocks"]


def test_every_step_is_told_in_order_where_all_is_well(capsys, made):
    with feeding(made) as listener:
        code, found = doctor(capsys, str(listener.token()))
    assert code == 0 and list(found) == STEPS
    assert {finding["verdict"] for finding in found.values()} <= {"ok", "note"}
    fingerprint = made.identity.fingerprint.hex()[:16]
    assert found["TLS"]["fact"].startswith("TLSv1.3, ") and fingerprint in found["TLS"]["fact"]
    assert found["admission"]["fact"] == "as a feeder's guest, by the token's secret, which both sides have"


def test_on_loopback_neither_token_nor_tls_is_needed(capsys):
    with feeding(Credentials()) as listener:
        code, found = doctor(capsys, str(listener.address))
    assert code == 0 and list(found) == STEPS
    assert found["TLS"]["fact"] == "none, which only loopback may do without"


def test_a_token_may_lie_in_a_file_and_go_with_another_address(capsys, made, tmp_path):
    with feeding(made) as listener, Link(str(listener.address)) as link:
        (tmp_path / "token").write_text(f"{listener.token()}\n")
        code, found = doctor(capsys, f"127.0.0.1:{link.address[1]}", "--token", str(tmp_path / "token"))
        assert code == 0 and list(found) == STEPS
        assert link.counters.connections >= 2


def test_certificates_of_one_ca_are_named(capsys, tmp_path):
    pytest.importorskip("cryptography", reason="identities need the extra `net`")
    issue(tmp_path, "ca", ca=None)
    ours, theirs = (issue(tmp_path, name, ca="ca") for name in ("trainer", "feeder"))
    with feeding(Credentials(certificates=theirs)) as listener:
        options = ["--ca", str(ours.ca), "--certificate", str(ours.certificate), "--key", str(ours.key)]
        code, found = doctor(capsys, str(listener.address), *options)
    assert code == 0 and "which your CA has signed" in found["TLS"]["fact"]
    assert found["admission"]["fact"].endswith("by certificates that the same CA has signed")


def test_a_far_and_slow_link_is_measured_and_said(capsys, made):
    with feeding(made) as listener, Link(str(listener.address), delay="30ms", rate="10mbit") as link:
        token = listener.token([f"127.0.0.1:{link.address[1]}"])
        code, found = doctor(capsys, str(token))
    assert code == 0
    assert found["round trip"]["verdict"] == "note" and "keep more batches under way" in found["round trip"]["remedy"]
    for way in ("rate up", "rate down"):
        assert found[way]["verdict"] == "note" and found[way]["remedy"].startswith("Slow: send bytes, not floats")
        megabits = float(found[way]["fact"].split("(")[1].split()[0])
        assert 3 < megabits < 20, "10 where the host is not busy"


def test_a_name_that_does_not_resolve(capsys):
    code, found = doctor(capsys, "cpu-0.invalid:7700")
    assert code == 9 and list(found) == ["name"]
    assert found["name"]["fact"] == "cpu-0.invalid does not resolve: this host does not know that name"
    assert "getent hosts" in found["name"]["remedy"]


def test_a_closed_port(capsys):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    code, found = doctor(capsys, f"127.0.0.1:{port}")
    assert code == 9 and list(found) == ["name", "TCP"]
    assert "the port is closed" in found["TCP"]["fact"] and f"doctor ports {port}" in found["TCP"]["remedy"]


def test_the_second_address_of_a_token_is_tried_where_the_first_is_closed(capsys, made):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with feeding(made) as listener:
        code, _ = doctor(capsys, str(listener.token([f"127.0.0.1:{port}", listener.address])))
    assert code == 0


@pytest.mark.parametrize("secured", [False, True])
def test_something_that_is_not_trainfleet(capsys, made, secured):
    with speaking(
        lambda sock: sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" if sock.recv(4096) else b"")
    ) as address:
        options = ["--token", str(made.token([address]))] if secured else []
        code, found = doctor(capsys, address, *options)
    assert code in (9, 16) and list(found)[-1] == "admission"
    says = "does not speak TLS" if secured else "does not speak like trainfleet"
    assert says in found["admission"]["fact"] and "Another program may have th" in found["admission"]["remedy"]


def test_something_that_never_answers(capsys, monkeypatch, made):
    monkeypatch.setattr(network, "CONNECT_SECONDS", 0.3)
    with speaking(lambda sock: sock.recv(1 << 16) and sock.recv(1)) as address:
        code, found = doctor(capsys, address, "--token", str(made.token([address])))
        assert code == 9 and "does not answer TLS in time" in found["admission"]["fact"]
        code, found = doctor(capsys, address)
        assert code == 9 and "did not answer in time" in found["admission"]["fact"]


def test_a_token_of_another_secret(capsys, made):
    with feeding(made) as listener:
        other = replace(listener.token(), secret=secrets.token_bytes(16))
        code, found = doctor(capsys, str(other))
    assert code == 16 and found["TLS"]["verdict"] == "ok"
    assert found["admission"]["fact"].endswith("says that our secret is not its own")


def test_a_token_of_another_identity(capsys, made):
    with feeding(made) as listener:
        other = Credentials.make().token([listener.address])
        code, found = doctor(capsys, str(other))
    assert code == 16 and "but the token says" in found["admission"]["fact"]
    assert "take the token that it prints now" in found["admission"]["remedy"]


def test_a_token_that_was_not_copied_whole(capsys, made):
    code, found = doctor(capsys, str(made.token(["127.0.0.1:7700"]))[:-5])
    assert code == 16 and list(found) == ["token"] and "cut off" in found["token"]["fact"]
    assert found["token"]["remedy"] == "Copy the whole line that the other side printed."


def test_no_token_where_one_is_wanted(capsys, made):
    with feeding(made) as listener:
        code, found = doctor(capsys, str(listener.address))
    assert code == 16 and "wants TLS, and we spoke without" in found["admission"]["fact"]


def test_tls_where_none_is_meant(capsys, made):
    with feeding(Credentials(secret=made.secret)) as listener:
        code, found = doctor(capsys, str(made.token([listener.address])))
    assert code == 16 and "does not speak TLS" in found["admission"]["fact"]
    assert "started without credentials" in found["admission"]["remedy"]


def test_no_credentials_off_loopback_shows_the_certificate_and_goes_no_further(capsys, made, monkeypatch):
    from trainfleet.net.address import Address

    monkeypatch.setattr(Address, "is_loopback", property(lambda self: False))
    with feeding(made) as listener:
        code, found = doctor(capsys, str(listener.address))
    assert code == 2 and list(found)[-1] == "credential"
    assert "CN=trainfleet, which nothing here vouches for" in found["TLS"]["fact"]
    assert "anyone could read along" in found["credential"]["fact"]


def test_another_version(capsys):
    def say(sock: socket.socket) -> None:
        ends = network.time.monotonic() + 2
        hello.read_message(sock, ends, "us")
        theirs = {"protocol": hello.PROTOCOL + 1, "version": "9.9.9", "role": "feeder", "nonce": "", "secret": False}
        hello.send_message(sock, theirs, ends)
        sock.recv(1)

    with speaking(say) as address:
        code, found = doctor(capsys, address)
    assert code == 16 and "runs trainfleet 9.9.9 (protocol 2), and we run" in found["admission"]["fact"]
    assert found["admission"]["remedy"] == "Install the same version on both sides."


def test_a_listener_that_admits_no_doctor_or_answers_no_probe(capsys):
    with feeding(Credentials(), admits=("trainer",)) as listener:
        code, found = doctor(capsys, str(listener.address))
    assert code == 16 and "does not talk to our role" in found["admission"]["fact"]
    with feeding(Credentials(), answers=False) as listener:
        code, found = doctor(capsys, str(listener.address))
    assert code == 9 and "has admitted us, but ends the probe" in found["probe"]["fact"]
    assert found["admission"]["verdict"] == "ok"


def test_a_certificate_that_ends_soon_is_a_note(capsys, made, monkeypatch):
    monkeypatch.setattr(network, "_measure", lambda probe: iter(()))
    for until, words in ((timedelta(days=3), "it ends on"), (timedelta(days=-3), "it ended on")):
        monkeypatch.setattr(network, "_owner", lambda sock, until=until: ("CN=x", datetime.now(timezone.utc) + until))
        with feeding(made) as listener:
            code, found = doctor(capsys, str(listener.token()))
        assert code == 0 and found["TLS"]["verdict"] == "note" and words in found["TLS"]["fact"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["[::1:7700"], "is no address"),
        (["127.0.0.1:7700", "--token", "/nowhere/token"], "neither a token nor a file that holds one"),
        (["127.0.0.1:7700", "--ca", "ca.pem"], "Certificates need all three"),
        (["one", "two"], "doctor looks at one address at a time, and was given 2: one two."),
        (["--token", "tf1_x"], "A token or certificates are for an address"),
    ],
)
def test_what_cannot_be_asked_is_a_sentence(capsys, arguments, words):
    with pytest.raises(SystemExit) as ended:
        main(["doctor", *arguments])
    assert ended.value.code == 2 and words in capsys.readouterr().err
