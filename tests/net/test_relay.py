from __future__ import annotations

import random
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import pytest

from trainfleet.errors import ConfigError, NotAdmitted, PeerError
from trainfleet.net import parked
from trainfleet.net.credentials import Credentials
from trainfleet.net.dial import dial, peer_of
from trainfleet.net.listener import Listener
from trainfleet.net.relay import Limits, Relay
from trainfleet.net.room import enter_room, room_of
from trainfleet.net.token import Token

pytestmark = pytest.mark.usefixtures("leaves_nothing")

SOON = timedelta(seconds=5)


@pytest.fixture(scope="session")
def own() -> Credentials:
    """The relay's credentials, which are not those of the sides."""
    pytest.importorskip("cryptography", reason="identities need the extra `net`")
    return Credentials.make()


def until(claim: Callable[[], bool]) -> None:
    ends = time.monotonic() + 5
    while not claim() and time.monotonic() < ends:
        time.sleep(0.01)
    assert claim()


@contextmanager
def sides(relay: Relay, made: Credentials) -> Iterator[tuple[socket.socket, socket.socket, Listener]]:
    """A connection through the relay, both ends, and the listener."""
    with Listener(None, credentials=made, role="feeder", via=relay.token()) as listener:
        near = dial(str(listener.token()), role="trainer", timeout=SOON)
        far = listener.accept(SOON)
        near.settimeout(5)
        far.settimeout(5)
        with near, far:
            yield near, far, listener


def test_two_sides_that_only_dial_meet_with_tls_end_to_end(own, made):
    with Relay("127.0.0.1:0", credentials=own) as relay, sides(relay, made) as (near, far, _):
        assert isinstance(near, ssl.SSLSocket) and isinstance(far, ssl.SSLSocket)
        assert near.version() == far.version() == "TLSv1.3"
        assert peer_of(near).role == "feeder" and peer_of(near).proved and peer_of(far).proved
        size = 3_000_000
        payload = bytes(range(256)) * (size // 256)
        thread = threading.Thread(target=far.sendall, args=(payload,))
        thread.start()
        got = b""
        while len(got) < len(payload):
            got += near.recv(1 << 16)
        thread.join()
        assert got == payload


def test_a_taken_connection_is_replaced_so_that_many_may_come(own, made):
    with (
        Relay("127.0.0.1:0", credentials=own) as relay,
        Listener(None, credentials=made, role="feeder", via=relay.token()) as listener,
    ):
        token, near = listener.token(), []
        threads = [
            threading.Thread(target=lambda: near.append(dial(token, role="trainer", timeout=timedelta(seconds=20))))
            for _ in range(10)
        ]
        for thread in threads:
            thread.start()
        far = [listener.accept(timedelta(seconds=20)) for _ in threads]
        for thread in threads:
            thread.join()
        until(lambda: relay.counts() == (4, 10))
        for sock in near + far:
            sock.close()
        until(lambda: relay.counts() == (4, 0))


def test_the_relay_sees_neither_the_secret_nor_what_is_said(own, made, monkeypatch):
    seen = bytearray()
    original = socket.socket.recv_into

    class Watched(socket.socket):
        def recv_into(self, buffer, *others):  # type: ignore[no-untyped-def]
            count = original(self, buffer, *others)
            seen.extend(bytes(buffer[:count]))
            return count

    from trainfleet.net import room

    monkeypatch.setattr(room.socket, "socket", Watched)
    with Relay("127.0.0.1:0", credentials=own) as relay, sides(relay, made) as (near, far, _):
        near.sendall(b"the words of the trainer")
        assert far.recv(99) == b"the words of the trainer"
    monkeypatch.undo()
    assert len(seen) > 500, "nothing was watched"
    assert b"trainer" not in seen and made.secret not in seen and made.secret.hex().encode() not in seen
    assert made.secret.hex() not in room_of(made.secret)


def test_half_a_close_is_passed_on_and_the_other_way_stays_open(own, made):
    room = room_of(made.secret)
    with Relay("127.0.0.1:0", credentials=own) as relay:
        ends = time.monotonic() + 5
        far = enter_room(relay.token(), room, "listens", ends)
        near = enter_room(relay.token(), room, "dials", ends)
        with near, far:
            near.settimeout(5)
            far.settimeout(5)
            near.sendall(b"the question")
            near.shutdown(socket.SHUT_WR)
            assert _all(far) == b"the question"
            far.sendall(b"the answer")
            far.shutdown(socket.SHUT_WR)
            assert _all(near) == b"the answer"
        until(lambda: relay.counts() == (0, 0))


def _all(sock: socket.socket) -> bytes:
    got = b""
    while chunk := sock.recv(4096):
        got += chunk
    return got


def test_when_one_side_is_killed_the_other_sees_the_end_and_nothing_stays(own, made):
    with Relay("127.0.0.1:0", credentials=own) as relay, sides(relay, made) as (near, far, _):
        far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset, as of a killed process
        socket.socket(fileno=far.detach()).close()
        with suppress(ConnectionError, ssl.SSLEOFError):
            assert near.recv(9) == b""
        until(lambda: relay.counts()[1] == 0)


def test_a_relay_cut_in_the_middle_ends_both_and_a_new_one_is_found(own, made, caplog):
    relay = Relay("127.0.0.1:0", credentials=own)
    token, place = relay.token(), relay.address
    with Listener(None, credentials=made, role="feeder", via=token) as listener:
        near = dial(listener.token(), role="trainer", timeout=SOON)
        far = listener.accept(SOON)
        relay.close()
        for sock in (near, far):
            sock.settimeout(5)
            with sock, suppress(ConnectionError, ssl.SSLEOFError):
                assert sock.recv(9) == b""
        with Relay(place, credentials=own):
            near = dial(listener.token(), role="trainer", timeout=timedelta(seconds=20))
            far = listener.accept(SOON)
            near.sendall(b"again")
            assert far.recv(9) == b"again"
            near.close()
            far.close()


def test_a_parked_connection_that_died_is_not_given_to_anyone(own, made):
    with Relay("127.0.0.1:0", credentials=own) as relay:
        room, ends = room_of(made.secret), time.monotonic() + 5
        dead = enter_room(relay.token(), room, "listens", ends)
        alive = enter_room(relay.token(), room, "listens", ends)
        dead.close()
        with alive, enter_room(relay.token(), room, "dials", ends) as near:
            near.sendall(b"x")
            alive.settimeout(5)
            assert alive.recv(1) == b"x"


def test_the_dead_are_swept_out_while_nobody_dials(own, made):
    with Relay("127.0.0.1:0", credentials=own) as relay:
        sock = enter_room(relay.token(), room_of(made.secret), "listens", time.monotonic() + 5)
        until(lambda: relay.counts() == (1, 0))
        sock.close()
        until(lambda: relay.counts() == (0, 0))


def test_nobody_listens_in_the_room_is_said_at_the_end_of_the_wait(own, made):
    with (
        Relay("127.0.0.1:0", credentials=own) as relay,
        pytest.raises(PeerError, match="has nobody who listens in the room"),
    ):
        dial(made.token(via=relay.token()), role="trainer", timeout=timedelta(seconds=0.5))


def test_who_is_in_the_room_by_another_secret_is_not_met(own, made):
    other = Credentials.make()
    with (
        Relay("127.0.0.1:0", credentials=own) as relay,
        Listener(None, credentials=made, role="feeder", via=relay.token()),
        pytest.raises(PeerError, match="has nobody who listens in the room"),
    ):
        dial(other.token(via=relay.token()), role="trainer", timeout=timedelta(seconds=0.5))


def test_an_impostor_in_the_room_is_found_out_by_its_certificate(own, made):
    """Whoever runs the relay may park what it likes: it does not have the key."""
    impostor = Credentials(secret=made.secret, identity=Credentials.make().identity)
    with (
        Relay("127.0.0.1:0", credentials=own) as relay,
        Listener(None, credentials=impostor, role="feeder", via=relay.token()),
        pytest.raises(NotAdmitted, match="but the token says"),
    ):
        dial(made.token(via=relay.token()), role="trainer", timeout=SOON)


def test_only_who_has_its_token_may_use_a_relay(own, made):
    with Relay("127.0.0.1:0", credentials=own) as relay:
        token = relay.token()
        wrong = Token.make(token.addresses, fingerprint=token.fingerprint)
        with pytest.raises(NotAdmitted, match="our secret is not its own"):
            Listener(None, credentials=made, role="feeder", via=wrong)
        with pytest.raises(NotAdmitted, match=r"is a relay|does not talk"):
            dial(token, role="trainer", timeout=SOON)


def test_a_relay_that_is_not_there_is_said(own, made, monkeypatch):
    monkeypatch.setattr(parked, "_FIRST", timedelta(seconds=0.3))
    with Relay("127.0.0.1:0", credentials=own) as relay:
        token = relay.token()
    with pytest.raises(PeerError, match=r"The relay at 127\.0\.0\.1:\d+ could not be reached within 0\.3 s"):
        Listener(None, credentials=made, role="feeder", via=token)


def test_rooms_parked_connections_and_pairs_are_capped(own):
    limits = Limits(rooms=2, parked=1, pairs=1)
    with Relay("127.0.0.1:0", credentials=own, limits=limits) as relay:
        token, ends, kept = relay.token(), time.monotonic() + 10, []

        def enter(room: int, side: str) -> None:
            kept.append(enter_room(token, f"{room:064x}", side, ends))  # type: ignore[arg-type]

        enter(1, "listens")
        enter(2, "listens")
        for room in (1, 3):  # a second one in a room, a third room
            with pytest.raises(PeerError, match="too many connections"):
                enter(room, "listens")
        enter(1, "dials")
        with pytest.raises(PeerError, match="too many connections"):
            enter(2, "dials")
        for sock in kept:
            sock.close()


def test_a_pair_that_is_idle_both_ways_ends(own):
    with Relay("127.0.0.1:0", credentials=own, limits=Limits(idle=timedelta(seconds=0.4))) as relay:
        ends = time.monotonic() + 10
        far = enter_room(relay.token(), "0" * 64, "listens", ends)
        near = enter_room(relay.token(), "0" * 64, "dials", ends)
        with near, far:
            for _ in range(8):  # one way only, for twice the time
                near.sendall(b"x")
                time.sleep(0.1)
            far.settimeout(5)
            assert far.recv(99) == b"x" * 8
            begin = time.monotonic()
            assert far.recv(99) == b"" and 0.2 < time.monotonic() - begin < 2


def test_bytes_per_second_are_kept(own):
    limits = Limits(bytes_per_second=200_000)
    with Relay("127.0.0.1:0", credentials=own, limits=limits) as relay:
        ends = time.monotonic() + 10
        far = enter_room(relay.token(), "0" * 64, "listens", ends)
        near = enter_room(relay.token(), "0" * 64, "dials", ends)
        with near, far:
            begin = time.monotonic()
            near.sendall(bytes(100_000))
            near.shutdown(socket.SHUT_WR)
            far.settimeout(5)
            assert len(_all(far)) == 100_000
            assert 0.4 < time.monotonic() - begin < 1.5


def test_a_wish_that_is_none_ends_the_connection(own):
    from trainfleet.net.hello import send_message

    with Relay("127.0.0.1:0", credentials=own) as relay:
        for wish in ({}, {"room": "x", "side": "dials"}, {"room": "0" * 64, "side": "above"}, {"room": 7}):
            sock = dial(relay.token(), role="guest", timeout=SOON)
            with sock:
                sock.settimeout(5)
                send_message(sock, wish, time.monotonic() + 5)
                assert sock.recv(9) == b""
        assert relay.counts() == (0, 0)


def test_off_loopback_a_relay_needs_credentials():
    with pytest.raises(ConfigError, match="anyone could connect"):
        Relay("0.0.0.0:0", credentials=Credentials())


def test_limits_that_allow_nothing_are_refused():
    with pytest.raises(ConfigError, match="one pair at least"):
        Limits(pairs=0)
    with pytest.raises(ConfigError, match="bytes_per_second is 0"):
        Limits(bytes_per_second=0)


@pytest.mark.matrix
@pytest.mark.parametrize("seed", range(3))
def test_guests_that_come_go_and_are_reset_while_the_relay_dies_twice_leave_nothing(own, made, seed):
    """Eight diallers at once, each connection ended in one of four ways; what arrives is what was sent."""
    chance, wrong, ended = random.Random(seed), [], threading.Event()
    relay = Relay("127.0.0.1:0", credentials=own)
    place = relay.address

    def echo(sock: socket.socket) -> None:
        with sock, suppress(OSError):
            sock.settimeout(20)
            while chunk := sock.recv(1 << 16):
                sock.sendall(chunk)

    def call(seed: int) -> None:
        chance = random.Random(seed)
        while not ended.is_set():
            try:
                sock = dial(token, role="trainer", timeout=timedelta(seconds=20), closing=ended)
            except NotAdmitted as exc:
                wrong.append(str(exc))
                return
            except PeerError:
                continue
            with sock, suppress(OSError):
                sock.settimeout(20)
                for _ in range(chance.randint(0, 4)):
                    sent = chance.randbytes(chance.randint(1, 100_000))
                    sock.sendall(sent)  # one thread: OpenSSL mixes up what two do at once
                    got = b""
                    while len(got) < len(sent) and (chunk := sock.recv(1 << 16)):
                        got += chunk
                    if not sent.startswith(got):
                        wrong.append("other bytes")
                if chance.random() < 0.3:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    with Listener(None, credentials=made, role="feeder", via=relay.token()) as listener:
        token = listener.token()
        callers = [threading.Thread(target=call, args=(100 * seed + number,)) for number in range(8)]
        for thread in callers:
            thread.start()
        echoes, ends, count = [], time.monotonic() + 6, 0
        deaths = [time.monotonic() + chance.uniform(1, 2), time.monotonic() + chance.uniform(3, 4)]
        while time.monotonic() < ends:
            with suppress(TimeoutError):
                echoes.append(threading.Thread(target=echo, args=(listener.accept(timedelta(seconds=0.2)),)))
                echoes[-1].start()
                count += 1
            if deaths and time.monotonic() > deaths[0]:
                deaths.pop(0)
                relay.close()
                relay = Relay(place, credentials=own)
        ended.set()
        relay.close()
        for thread in callers + echoes:
            thread.join(30)
            assert not thread.is_alive()
    assert count > 20 and wrong == []
