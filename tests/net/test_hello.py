from __future__ import annotations

import json
import random
import socket
import threading
import time
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainfleet.errors import NotAdmitted, PeerError
from trainfleet.net import hello
from trainfleet.net.hello import MAGIC, PROTOCOL, Manners, Peer, introduce, read_message, receive, send_message

SECRET = b"0123456789abcdef"
FINGERPRINT = bytes(range(32))


def manners(role: str, **others: Any) -> Manners:
    asked = {"admits": None, "secret": SECRET, "fingerprint": FINGERPRINT, "certified": False, "address": "cpu-0:7700"}
    return Manners(role=role, **(asked | others))


def meet(dialler: Manners, listener: Manners) -> tuple[Peer | Exception, Peer | Exception]:
    """What each side finds, or raises."""
    here, there = socket.socketpair()
    found: dict[str, Peer | Exception] = {}

    def run(name: str, sock: socket.socket, action: Any) -> None:
        try:
            found[name] = action()
        except (PeerError, OSError) as exc:
            found[name] = exc
            sock.shutdown(socket.SHUT_WR)

    ends = time.monotonic() + 5
    with here, there:
        thread = threading.Thread(
            target=run, args=("listener", there, lambda: receive(there, listener, ends, slow=lambda: None))
        )
        thread.start()
        run("dialler", here, lambda: introduce(here, dialler, ends))
        thread.join()
    return found["dialler"], found["listener"]


def test_both_sides_learn_who_the_other_is():
    listener, dialler = meet(manners("trainer"), manners("feeder"))
    assert isinstance(listener, Peer) and isinstance(dialler, Peer)
    assert (listener.role, dialler.role) == ("feeder", "trainer")
    assert listener.proved and dialler.proved and listener.version == dialler.version


def test_without_a_secret_nothing_is_proved():
    found = meet(manners("trainer", secret=None), manners("feeder", secret=None))
    assert all(isinstance(peer, Peer) and not peer.proved for peer in found)


@pytest.mark.parametrize(
    ("dialler", "listener", "at_dialler", "at_listener"),
    [
        ({"secret": SECRET[::-1]}, {}, "says that our secret is not its own", "does not know our secret"),
        ({"fingerprint": bytes(32)}, {}, "says that our secret is not its own", "does not know our secret"),
        ({"fingerprint": None}, {}, "says that our secret is not its own", "does not know our secret"),
        ({"secret": None}, {}, "wants a secret, and we have none", "knows no secret"),
        ({}, {"secret": None}, "knows no secret", "wants a secret, and we have none"),
        ({"role": "viewer"}, {"admits": {"trainer"}}, "does not talk to our role", "is a viewer; we, a feeder"),
        ({"admits": {"trainer"}}, {}, "is a feeder; we, a trainer, talk to a trainer", "early"),
    ],
)
def test_those_who_do_not_fit_part_with_a_sentence_on_both_sides(dialler, listener, at_dialler, at_listener):
    role = dialler.pop("role", "trainer")
    one, other = meet(manners(role, **dialler), manners("feeder", **listener))
    assert isinstance(one, NotAdmitted) and at_dialler in str(one)
    assert isinstance(other, (NotAdmitted, ConnectionError)) and at_listener in str(other)


def test_other_versions_part_and_name_both(monkeypatch):
    sent = send_message

    def from_the_future(sock: socket.socket, message: dict[str, Any], ends: float) -> bytes:
        if message.get("role") == "trainer":
            message = message | {"protocol": PROTOCOL + 1, "version": "9.9.9"}
        return sent(sock, message, ends)

    monkeypatch.setattr(hello, "send_message", from_the_future)
    one, other = meet(manners("trainer"), manners("feeder"))
    assert isinstance(other, NotAdmitted) and "9.9.9 (protocol 2)" in str(other) and "(protocol 1)" in str(other)
    # The dialler here is our own code too, so it finds nothing strange in a listener of protocol 1: it is told.
    assert isinstance(one, NotAdmitted) and "another version" in str(one)


class Recording:
    """A socket that keeps what was sent through it."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock, self.sent = sock, b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sock, name)

    def sendall(self, data: bytes) -> None:
        self.sent += data
        self.sock.sendall(data)


def test_an_impostor_who_does_not_know_the_secret_is_found_out_and_learns_nothing():
    here, there = socket.socketpair()
    ends = time.monotonic() + 5
    recorded = Recording(here)

    def impostor() -> None:
        theirs, _ = read_message(there, ends, "x")
        send_message(there, theirs | {"role": "feeder"}, ends)  # even with our own nonce sent back to us
        proof, _ = read_message(there, ends, "x")
        send_message(there, proof, ends)  # and our own proof

    thread = threading.Thread(target=impostor)
    thread.start()
    with here, there, pytest.raises(NotAdmitted, match="does not know our secret"):
        introduce(recorded, manners("trainer"), ends)  # type: ignore[arg-type]
    thread.join()
    assert SECRET not in recorded.sent and SECRET.hex().encode() not in recorded.sent


def test_a_listener_proves_nothing_to_who_has_proved_nothing():
    here, there = socket.socketpair()
    ends, recorded = time.monotonic() + 5, Recording(there)
    with here, there:
        send_message(here, json.loads(_hello_bytes()), ends)
        send_message(here, {"proof": "0" * 64}, ends)
        with pytest.raises(NotAdmitted):
            receive(recorded, manners("feeder"), ends, slow=lambda: None)  # type: ignore[arg-type]
    assert b"proof" not in recorded.sent and b'{"refused":"secret"}' in recorded.sent


def test_a_recorded_conversation_opens_nothing_later():
    here, there = socket.socketpair()
    ends = time.monotonic() + 5
    recorded = Recording(here)
    thread = threading.Thread(target=receive, args=(there, manners("feeder"), ends), kwargs={"slow": lambda: None})
    thread.start()
    with here, there:
        introduce(recorded, manners("trainer"), ends)  # type: ignore[arg-type]
        thread.join()
    here, there = socket.socketpair()
    with here, there, pytest.raises(NotAdmitted):
        here.sendall(recorded.sent)
        receive(there, manners("feeder"), ends, slow=lambda: None)


def _hello_bytes() -> bytes:
    ours = {"protocol": PROTOCOL, "version": "0.1.0", "role": "trainer", "nonce": "0" * 64, "secret": True}
    return json.dumps(ours).encode()


def _receive(data: bytes) -> Exception:
    """What a listener makes of these bytes and then the end."""
    here, there = socket.socketpair()
    with here, there:
        here.sendall(data)
        here.shutdown(socket.SHUT_WR)
        with pytest.raises((PeerError, OSError)) as raised:
            receive(there, manners("feeder"), time.monotonic() + 5, slow=lambda: None)
    return raised.value


@settings(max_examples=300)
@given(st.binary(max_size=200) | st.binary(max_size=200).map(lambda body: MAGIC + len(body).to_bytes(2, "big") + body))
def test_no_bytes_admit_anyone_or_break_the_listener(data):
    _receive(data)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
keys = st.sampled_from(["protocol", "version", "role", "nonce", "secret", "refused", "proof"])


@settings(max_examples=300)
@given(st.dictionaries(keys, values, min_size=1))
def test_no_value_in_a_hello_admits_anyone_or_breaks_the_listener(changes):
    body = json.dumps(json.loads(_hello_bytes()) | changes).encode()[:1024]
    _receive(MAGIC + len(body).to_bytes(2, "big") + body)


def test_flipped_bits_of_a_hello_admit_nobody():
    chance, whole = random.Random(2), MAGIC + len(_hello_bytes()).to_bytes(2, "big") + _hello_bytes()
    for _ in range(300):
        flipped = bytearray(whole)
        for _ in range(chance.randint(1, 8)):
            flipped[chance.randrange(len(flipped))] ^= 1 << chance.randrange(8)
        _receive(bytes(flipped))


def test_a_long_message_is_refused_by_its_length_alone():
    assert "does not speak like trainfleet" in str(_receive(MAGIC + (1025).to_bytes(2, "big")))
    nested = b"[" * 1024
    assert "does not speak like trainfleet" in str(_receive(MAGIC + len(nested).to_bytes(2, "big") + nested))


@pytest.mark.parametrize("reason", ["x" * 500, "\x1b[2Jsecret", 7, None, ["secret"]])
def test_words_of_a_peer_are_not_shown(reason):
    here, there = socket.socketpair()
    with here, there:
        send_message(there, {"refused": reason}, time.monotonic() + 1)
        with suppress(OSError), pytest.raises(NotAdmitted, match=r"^cpu-0:7700 refuses us\.$"):
            read_message(here, time.monotonic() + 1, "cpu-0:7700")
