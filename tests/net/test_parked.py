from __future__ import annotations

import threading
import time
from datetime import timedelta

import pytest

from trainfleet.errors import ConfigError
from trainfleet.net.admission import MOST_PENDING, Admission
from trainfleet.net.credentials import Credentials
from trainfleet.net.parked import Parked
from trainfleet.net.relay import Relay
from trainfleet.net.token import Token

pytestmark = pytest.mark.usefixtures("leaves_nothing")


def admission(credentials: Credentials) -> Admission:
    handshake = timedelta(seconds=5)
    return Admission(credentials, role="feeder", admits=None, handshake=handshake, most_pending=MOST_PENDING)


def close(parked: Parked, own: Admission) -> None:
    own.closing.set()
    parked.close()
    own.close()


def test_four_wait_and_are_parked_again_when_the_relay_lets_go_of_them(made):
    with Relay("127.0.0.1:0", credentials=made) as relay:
        token, place, own = relay.token(), relay.address, admission(made)
        parked = Parked(token, made, own)
        assert _waiting(relay, 4)
    with Relay(place, credentials=made) as relay:
        assert _waiting(relay, 4)
        close(parked, own)
        assert _waiting(relay, 0)
    assert not own.refused


def _waiting(relay: Relay, count: int) -> bool:
    ends = time.monotonic() + 10
    while relay.counts()[0] != count and time.monotonic() < ends:
        time.sleep(0.01)
    return relay.counts()[0] == count


def test_closing_does_not_wait_for_a_relay_that_is_gone(made):
    with Relay("127.0.0.1:0", credentials=made) as relay:
        own = admission(made)
        parked = Parked(relay.token(), made, own)
    time.sleep(0.2)
    begin = time.monotonic()
    close(parked, own)
    close(parked, own)
    assert time.monotonic() - begin < 3
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("parked")]


def test_a_relay_with_another_certificate_is_said_once(made, caplog):
    with Relay("127.0.0.1:0", credentials=made) as relay:
        place, own = relay.address, admission(made)
        parked = Parked(relay.token(), made, own)
    with Relay(place, credentials=Credentials.make()):
        ends = time.monotonic() + 5
        while not caplog.messages and time.monotonic() < ends:
            time.sleep(0.02)
        time.sleep(0.3)  # the others find it too
        close(parked, own)
    assert len(caplog.messages) == 1
    assert "Nobody can connect through the relay" in caplog.messages[0] and "certificate" in caplog.messages[0]


def test_without_an_identity_nobody_waits_at_a_relay():
    via = Token.make(["relay.example"], fingerprint=bytes(32))
    for credentials in (Credentials(), Credentials(secret=b"0123456789abcdef")):
        own = admission(credentials)
        with pytest.raises(ConfigError, match="needs a secret, which names the room"):
            Parked(via, credentials, own)
        own.close()
