from __future__ import annotations

import socket
import ssl
import stat
import sys
import threading
import time

import pytest
from certificates import issue
from left_behind import open_sockets

from trainfleet.errors import ConfigError, DependencyError, NotAdmitted
from trainfleet.net.tls import (
    Certificates,
    Identity,
    check_fingerprint,
    peer_fingerprint,
    pinned_context,
    refusal,
    start_tls,
)

pytest.importorskip("cryptography", reason="identities need the extra `net`")


def meet(server: ssl.SSLContext, client: ssl.SSLContext, name: str = "localhost") -> tuple[ssl.SSLSocket, list]:
    """The client's end after the handshake, or what it raised; and what the server raised."""
    here, there = socket.socketpair()
    errors: list[Exception] = []

    def serve() -> None:
        try:
            with server.wrap_socket(there, server_side=True) as sock:
                sock.recv(1)
        except OSError as exc:
            errors.append(exc)
            there.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        here.settimeout(5)
        sock = client.wrap_socket(here, server_hostname=name)
        sock.sendall(b"x")
        return sock, errors
    finally:
        here.close()
        thread.join()


def test_an_identity_is_known_by_its_fingerprint_over_tls_1_3():
    identity = Identity.make()
    sock, errors = meet(identity.server_context(), pinned_context())
    with sock:
        assert sock.version() == "TLSv1.3" and not errors
        assert peer_fingerprint(sock) == identity.fingerprint
        check_fingerprint(sock, identity.fingerprint, "cpu-0:7700")
        with pytest.raises(NotAdmitted, match=r"cpu-0:7700 has the certificate [0-9a-f]{16}, but the token says 0000"):
            check_fingerprint(sock, bytes(32), "cpu-0:7700")


def test_an_older_tls_is_refused_by_either_side():
    identity, old = Identity.make(), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError) as raised:
        meet(identity.server_context(), old)
    assert "older TLS" in str(refusal(raised.value, "cpu-0:7700"))
    server = identity.server_context()
    server.minimum_version, server.maximum_version = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError) as raised:
        meet(server, pinned_context())
    assert "older TLS" in str(refusal(raised.value, "cpu-0:7700"))


def test_a_kept_identity_outlives_a_restart_and_is_private(tmp_path):
    first = Identity.kept_in(tmp_path / "keys")
    assert Identity.kept_in(tmp_path / "keys") == first
    assert first.derive(b"a") != first.derive(b"b") and first.derive(b"a") == first.derive(b"a")
    (path,) = (tmp_path / "keys").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="others of this host may read") as raised:
        Identity.kept_in(tmp_path / "keys")
    assert raised.value.hint == f"chmod 600 {path}"


def test_threads_that_make_an_identity_at_once_get_the_same(tmp_path):
    found: list[Identity] = []
    threads = [threading.Thread(target=lambda: found.append(Identity.kept_in(tmp_path))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6 and len({identity.fingerprint for identity in found}) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["identity.pem"]


def test_a_damaged_identity_is_a_sentence(tmp_path):
    Identity.kept_in(tmp_path)
    path = tmp_path / "identity.pem"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ConfigError, match="no key and certificate"):
        Identity.kept_in(tmp_path)


def test_the_key_is_not_in_what_a_log_would_show():
    assert "PRIVATE" not in repr(Identity.make())


def test_without_cryptography_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(DependencyError, match=r'TLS off loopback needs the extra: pip install "trainfleet\[net\]"'):
        Identity.make()


def test_both_sides_show_certificates_of_the_ca(tmp_path):
    issue(tmp_path, "ca", ca=None)
    server, client = issue(tmp_path, "server", ca="ca"), issue(tmp_path, "client", ca="ca")
    sock, errors = meet(server.server_context(), client.client_context())
    with sock:
        assert sock.version() == "TLSv1.3" and not errors
        assert peer_fingerprint(sock) == server.fingerprint


@pytest.mark.parametrize(
    ("days", "ca", "name", "fact"),
    [
        ((-30, -1), "ca", "localhost", "expired"),
        ((2, 30), "ca", "localhost", "not yet valid"),
        ((-1, 30), "other", "localhost", "self-signed|unable to get local issuer"),
        ((-1, 30), "ca", "cpu-0", "Hostname mismatch"),
    ],
)
def test_a_certificate_that_does_not_hold_is_said_with_the_reason(tmp_path, days, ca, name, fact):
    for authority in ("ca", "other"):
        issue(tmp_path, authority, ca=None)
    server, client = issue(tmp_path, "server", ca=ca, days=days), issue(tmp_path, "client", ca="ca")
    with pytest.raises(ssl.SSLError) as raised:
        meet(server.server_context(), client.client_context(), name)
    refused = refusal(raised.value, "cpu-0:7700")
    assert refused is not None and refused.hint
    with pytest.raises(NotAdmitted, match=fact):
        raise refused


def test_files_that_are_missing_or_do_not_belong_together_are_named(tmp_path):
    issue(tmp_path, "ca", ca=None)
    one, two = issue(tmp_path, "one", ca="ca"), issue(tmp_path, "two", ca="ca")
    with pytest.raises(ConfigError, match=r"no file .*nowhere\.pem"):
        Certificates(ca=tmp_path / "nowhere.pem", certificate=one.certificate, key=one.key).server_context()
    with pytest.raises(ConfigError, match="cannot be used for TLS"):
        Certificates(ca=one.ca, certificate=one.certificate, key=two.key).client_context()
    (tmp_path / "one.key").write_text("no key")
    with pytest.raises(ConfigError, match="cannot be used for TLS"):
        one.server_context()


def test_a_connection_that_was_reset_before_tls_leaves_no_descriptor():
    """Also while someone keeps the error: the half-made socket is in its traceback."""
    before = open_sockets()
    with socket.create_server(("127.0.0.1", 0)) as server:
        here = socket.create_connection(server.getsockname())
        there, _ = server.accept()
        there.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        there.close()
        time.sleep(0.05)
        with pytest.raises(OSError) as kept:
            start_tls(pinned_context(), here, name="x", ends=time.monotonic() + 5)
    assert open_sockets() == before and kept.value.errno


def test_an_error_that_says_nothing_of_credentials_is_no_refusal():
    assert refusal(ssl.SSLEOFError(8, "EOF occurred in violation of protocol"), "cpu-0:7700") is None
    for reason in ("SSLV3_ALERT_BAD_RECORD_MAC", "TLSV1_ALERT_DECODE_ERROR", "SSLV3_ALERT_ILLEGAL_PARAMETER"):
        error = ssl.SSLError(1, reason)
        error.reason = reason
        assert refusal(error, "cpu-0:7700") is None, "what a flipped bit leads to"
