from __future__ import annotations

import pytest

from trainfleet.errors import ConfigError
from trainfleet.net.address import Address
from trainfleet.net.credentials import Credentials
from trainfleet.net.token import Token

SECRET = b"0123456789abcdef"


def test_nothing_listens_off_loopback_for_anyone():
    for credentials in (Credentials(), Credentials(secret=SECRET)):
        credentials.check_listens(Address("127.0.0.1"), loopback=True)
        with pytest.raises(ConfigError, match=r"0\.0\.0\.0:7700 can be reached from outside, and there are no cred"):
            credentials.check_listens(Address("0.0.0.0"), loopback=False)


def test_nothing_is_sent_in_plain_to_another_host():
    for credentials in (Credentials(), Credentials(secret=SECRET)):
        credentials.check_dials(Address("127.0.0.1"))
        with pytest.raises(ConfigError, match="no credentials for cpu-0:7700"):
            credentials.check_dials(Address("cpu-0"))


def test_an_identity_without_a_secret_would_let_anyone_in():
    pytest.importorskip("cryptography", reason="identities need the extra `net`")
    made = Credentials.make()
    made.check_listens(Address("0.0.0.0"), loopback=False)
    with pytest.raises(ConfigError, match="anyone could connect"):
        Credentials(identity=made.identity).check_listens(Address("0.0.0.0"), loopback=False)


def test_a_token_gives_the_dialler_what_the_listener_has():
    pytest.importorskip("cryptography", reason="identities need the extra `net`")
    made = Credentials.make()
    dials = Credentials.of(Token.parse(str(made.token(["cpu-0:7700"]))))
    assert made.identity is not None
    assert (dials.secret, dials.expected) == (made.secret, made.identity.fingerprint)
    assert dials.tls and made.tls and made.expected == dials.expected


def test_credentials_kept_in_a_folder_make_the_same_token_after_a_restart(tmp_path):
    pytest.importorskip("cryptography", reason="identities need the extra `net`")
    first, second = (Credentials.make(folder=tmp_path) for _ in range(2))
    assert str(first.token(["cpu-0"])) == str(second.token(["cpu-0"]))
    assert str(Credentials.make().token(["cpu-0"])) != str(Credentials.make().token(["cpu-0"]))


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ConfigError, match="needs 16"):
        Credentials(secret=b"short")
    with pytest.raises(ConfigError, match="have none"):
        Credentials().token(["127.0.0.1"])
    with pytest.raises(ConfigError, match="needs an identity"):
        Credentials(secret=SECRET, fingerprint=bytes(32)).server_context()


def test_the_secret_is_not_in_what_a_log_would_show():
    assert SECRET.decode() not in repr(Credentials(secret=SECRET))
