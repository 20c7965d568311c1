from __future__ import annotations

import random
import socket
import struct
import threading
import time
from collections import namedtuple
from datetime import timedelta

import numpy as np
import pytest
from xxhash import xxh3_64_digest, xxh3_128_digest

from trainfleet.errors import DataError, PeerError
from trainfleet.net.channel import Channel
from trainfleet.net.compression import PREFIX, available
from trainfleet.net.frames import Limits, pack
from trainfleet.net.structure import allow

Pair = namedtuple("Pair", "first second")
QUICK = Limits(max_bytes=1 << 24, stall=timedelta(seconds=0.3))


def sockets() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    return ours, theirs


def encrypted(ours: socket.socket, theirs: socket.socket) -> tuple[socket.socket, socket.socket]:
    """TLS over these; tickets are on, as other servers have them."""
    pytest.importorskip("cryptography", reason="makes the certificate")
    from trainfleet.net.tls import Identity, pinned_context

    context = Identity.make().server_context()
    context.num_tickets = 2
    wrapped: list[socket.socket] = []
    server = threading.Thread(target=lambda: wrapped.append(context.wrap_socket(theirs, server_side=True)))
    server.start()
    client = pinned_context().wrap_socket(ours)
    server.join()
    return client, wrapped[0]


@pytest.fixture(params=["tcp", "tls", "nearby"])
def ends(request):
    pair = encrypted(*sockets()) if request.param == "tls" else sockets()
    ours, theirs = (Channel(sock, limits=QUICK, nearby=request.param == "nearby") for sock in pair)
    yield ours, theirs
    ours.close()
    theirs.close()


@pytest.fixture
def raw_and_channel():
    """A socket that says what we like, and a channel that must bear it."""
    raw, other = sockets()
    with raw, Channel(other, limits=QUICK, classes=allow(Pair)) as channel:
        raw.recv(1 << 12)
        raw.sendall(hello())
        yield raw, channel


def hello(nearby: object = None) -> bytes:
    message = pack(".hello", {"nearby": nearby}, None, QUICK)
    return message.header(0) + message.head


def frame(**body: object) -> bytes:
    """The bytes of one good message, as a channel writes it."""
    raw, other = sockets()
    with raw, Channel(other, limits=QUICK) as channel:
        raw.recv(1 << 12)
        channel.send("batch", {"n": 1}, body)
        return raw.recv(1 << 20)


def test_messages_arrive_in_order_with_their_arrays(ends):
    ours, theirs = ends
    arrays = [np.random.default_rng(n).integers(0, 255, 700_000 + n, np.uint8) for n in range(5)]
    sender = threading.Thread(target=lambda: [ours.send("b", {"n": n}, [a, n]) for n, a in enumerate(arrays)])
    sender.start()
    for n, array in enumerate(arrays):
        kind, head, (back, number) = theirs.recv(5)
        assert (kind, head, number) == ("b", {"n": n}, n)
        assert np.array_equal(back, array)
    sender.join()
    assert ours.counters.frames_sent == theirs.counters.frames_received == 5
    assert ours.counters.bytes_sent == theirs.counters.bytes_received > 3_500_000


def test_both_ends_send_at_once_from_several_threads(ends):
    ours, theirs = ends

    def talk(channel: Channel, mark: int) -> None:
        for n in range(20):
            channel.send("x", {"mark": mark}, np.full(50_000, mark * 100 + n, np.int64))

    threads = [threading.Thread(target=talk, args=(c, m)) for m, c in enumerate((ours, ours, theirs))]
    for thread in threads:
        thread.start()
    seen = []
    for channel, count in ((theirs, 40), (ours, 20)):
        for _ in range(count):
            _, head, body = channel.recv(5)
            assert (body == body[0]).all()
            seen.append((head["mark"], int(body[0]) - head["mark"] * 100))
    for thread in threads:
        thread.join()
    assert sorted(seen) == [(m, n) for m in range(3) for n in range(20)]


def test_a_wait_without_a_message_loses_nothing(ends):
    ours, theirs = ends
    with pytest.raises(TimeoutError, match=r"No message came from 127\.0\.0\.1:\d+ within 0\.05 s"):
        theirs.recv(timedelta(seconds=0.05))
    ours.send("late")
    assert theirs.recv(1) == ("late", {}, None)


def test_buffers_are_used_again_when_the_arrays_are_gone(ends):
    ours, theirs = ends
    places = set()
    for _ in range(6):
        sender = threading.Thread(target=ours.send, args=("b", {}, {"x": np.ones(1 << 18)}))
        sender.start()
        body = theirs.recv(5).body
        sender.join()
        places.add(body["x"].ctypes.data)
        del body
    assert len(places) <= 2, "one each of the socket's and of shared memory"


@pytest.mark.parametrize("nearby", [False, True])
def test_what_arrives_lies_in_memory_of_the_allocator(nearby):
    asked = []
    a, b = sockets()
    with Channel(a) as ours, Channel(b, allocate=lambda n: asked.append(n) or bytearray(n), nearby=nearby) as theirs:
        ours.send("x")
        theirs.send("x")
        assert ours.recv(1) and theirs.recv(1)  # they have met
        ours.send("b", {}, np.arange(10_000))
        assert (theirs.recv(5).body == np.arange(10_000)).all() and len(asked) == 1


def test_what_cannot_travel_is_refused_before_anything_is_written(ends):
    ours, theirs = ends
    for body in ({1, 2}, np.zeros(1 << 22)):
        with pytest.raises(DataError):
            ours.send("bad", {}, body)
    with pytest.raises(DataError, match="for channels themselves"):
        ours.send(".mine")
    ours.send("good")
    assert theirs.recv(1).kind == "good"


def test_a_class_that_is_not_allowed_is_refused_and_the_next_message_comes(ends):
    ours, theirs = ends
    ours.send("b", {}, Pair(np.ones(1000), 2))
    ours.send("next", {}, np.ones(2))
    with pytest.raises(DataError, match="Pair, which is not among the classes"):
        theirs.recv(1)
    assert theirs.recv(1).kind == "next"


def test_a_peer_that_stops_in_the_middle_of_a_frame_is_named(raw_and_channel):
    raw, channel = raw_and_channel
    raw.sendall(frame(x=np.ones(9))[:-10])
    began = time.monotonic()
    with pytest.raises(PeerError, match=r"127\.0\.0\.1:\d+ sent a frame and stopped in the middle of it for 0\.3 s"):
        channel.recv(10)
    assert time.monotonic() - began < 3
    with pytest.raises(PeerError, match="closed: it sent a frame and stopped"):
        channel.send("x")


def test_a_peer_that_leaves_is_named(raw_and_channel):
    raw, channel = raw_and_channel
    raw.sendall(frame()[:20])
    raw.close()
    with pytest.raises(PeerError, match=r"127\.0\.0\.1:\d+ closed the connection"):
        channel.recv(10)


def test_a_peer_that_does_not_read_is_named(raw_and_channel):
    _, channel = raw_and_channel
    with pytest.raises(PeerError, match=r"stopped in the middle of it for 0\.3 s|Connection timed out"):
        for _ in range(10):
            channel.send("b", {}, np.ones(1 << 20))


def test_a_reset_is_a_sentence(raw_and_channel):
    raw, channel = raw_and_channel
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raw.close()
    with pytest.raises(PeerError, match="is gone: Connection reset by peer"):
        channel.recv(5)


def test_close_wakes_a_reader_and_may_be_called_twice(ends):
    ours, theirs = ends
    errors: list[Exception] = []

    def read() -> None:
        try:
            ours.recv(30)
        except PeerError as exc:
            errors.append(exc)

    reader = threading.Thread(target=read)
    reader.start()
    time.sleep(0.05)
    ours.close()
    ours.close()
    reader.join(timeout=5)
    assert "this end closed the connection" in str(errors[0])
    with pytest.raises(PeerError):
        theirs.recv(5)


def outcome(data: bytes) -> str:
    """What a channel makes of these bytes: at most a PeerError or DataError, and soon."""
    raw, other = sockets()
    limits = Limits(max_bytes=1 << 16, max_head_bytes=1 << 12, stall=timedelta(seconds=0.05))
    with raw, Channel(other, limits=limits) as channel:
        raw.sendall(hello() + data)
        raw.shutdown(socket.SHUT_WR)
        try:
            while True:
                channel.recv(1)
        except (PeerError, DataError) as exc:
            return f"{type(exc).__name__}: {exc}"


def test_a_flipped_bit_anywhere_is_found():
    good = frame(x=np.arange(50, dtype=np.float32), y=[1, "two", b"three"])
    rng = random.Random(0)
    assert "closed the connection" in outcome(good)
    for bit in rng.sample(range(len(good) * 8), 150):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        assert "sent what cannot be" in outcome(bytes(bad)), bit


def test_cut_frames_and_garbage_end_in_a_sentence():
    good = frame(x=np.arange(50, dtype=np.float32))
    rng = random.Random(1)
    for _ in range(60):
        assert outcome(good[: rng.randrange(1, len(good))]).startswith("PeerError")
        assert outcome(rng.randbytes(rng.randrange(1, 300))).startswith("PeerError")
        assert outcome(good + rng.randbytes(50)).startswith("PeerError")


def forged(head: bytes, payload: bytes, *, num_bytes: int, arrays: int = 1, flags: int = 1) -> bytes:
    facts = struct.pack("<4sBBHIIQ8s", b"TFfr", 1, flags, 0, len(head), arrays, num_bytes, xxh3_64_digest(head))
    return facts + xxh3_64_digest(facts) + head + payload + xxh3_128_digest(payload)


def test_no_memory_is_got_beyond_the_limit():
    asked: list[int] = []
    raw, other = sockets()
    with raw, Channel(other, limits=QUICK, allocate=lambda n: asked.append(n) or bytearray(n)) as channel:
        raw.sendall(hello() + forged(b'{"k":"b","h":{}}\n["a","|u1",[1099511627776]]', b"", num_bytes=1 << 40))
        with pytest.raises(PeerError, match="announces arrays of 1,099,511,627,776 bytes, and the limit is 16,777,216"):
            channel.recv(5)
    assert asked == []


def test_over_a_slow_link_payloads_are_made_smaller():
    if not available():
        pytest.skip("neither zstandard nor lz4 is installed")
    a, b = sockets()
    body = {"x": np.zeros(1 << 18, np.float32), "y": np.arange(100)}
    with Channel(a, nearby=False) as ours, Channel(b, nearby=False) as theirs:
        theirs.send("x")
        ours.recv(1)
        ours._compression.learn(1 << 26, 60.0)  # as if the last 64 MiB had taken a minute
        for size in (1 << 18, 1000):
            ours.send("b", {}, {"x": body["x"][:size], "y": body["y"]})
            back = theirs.recv(5).body
            assert (back["x"] == 0).all() and (back["y"] == body["y"]).all()
        assert ours.counters.bytes_sent < 20_000


def test_a_coded_payload_that_lies_about_its_length_is_refused(raw_and_channel):
    raw, channel = raw_and_channel
    raw.sendall(forged(b'{"k":"b","h":{}}\n["a","|u1",[64]]', PREFIX.pack(0, 1 << 50), num_bytes=64, flags=5))
    with pytest.raises(PeerError, match="coded bytes for 64"):
        channel.recv(5)


def test_a_frame_before_the_first_words_is_refused():
    raw, other = sockets()
    with raw, Channel(other, limits=QUICK) as channel:
        raw.sendall(frame())
        with pytest.raises(PeerError, match="kind 'batch' came out of turn"):
            channel.recv(5)


@pytest.mark.parametrize(
    "words",
    [
        3,
        [],
        {"door": 3},
        {"door": "x", "secret": "y", "seen": []},
        {"door": "0" * 32, "secret": "0" * 32, "seen": [["127.0.0.1", 1], ["127.0.0.1", 2]]},
    ],
)
def test_first_words_that_make_no_sense_leave_the_connection_as_it_is(words):
    raw, other = sockets()
    with raw, Channel(other, limits=QUICK) as channel:
        raw.sendall(hello(words) + frame(x=np.ones(3)))
        assert channel.recv(5).body["x"].sum() == 3


def test_a_frame_in_shared_memory_that_nobody_offered_is_refused(raw_and_channel):
    raw, channel = raw_and_channel
    raw.sendall(forged(b'{"k":"b","h":{}}\n["a","|u1",[64]]', b"", num_bytes=64, flags=2))
    with pytest.raises(PeerError, match="there is none between us"):
        channel.recv(5)


def test_what_was_sent_before_a_close_arrives(ends):
    """The other end's words, unread, must not make the kernel drop ours."""
    ours, theirs = ends
    theirs.send("never read")
    body = np.arange(100_000)
    ours.send("last", {}, body)
    ours.close()
    assert np.array_equal(theirs.recv(5).body, body)


def test_a_payload_without_digest_is_refused_over_plain_tcp(raw_and_channel):
    raw, channel = raw_and_channel
    raw.sendall(forged(b'{"k":"b","h":{}}\n["a","|u1",[64]]', bytes(64), num_bytes=64, flags=0))
    with pytest.raises(PeerError, match="has no digest"):
        channel.recv(5)
