from __future__ import annotations

import contextlib
import fcntl
import gc
import multiprocessing
import os
import signal
import socket
import threading
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from trainfleet.errors import PeerError
from trainfleet.net.channel import Channel
from trainfleet.net.frames import Limits
from trainfleet.net.nearby import _FREE, _NEW, _WORD, AVAILABLE, FEW, Door, Nearby

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs memfd and abstract unix sockets, which Linux has")
LARGE = 1 << 18


def sockets() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    return ours, theirs


@pytest.fixture
def met():
    """Both ends' memory, in the order (who called, who answered)."""
    socks = sockets()
    doors = [Door(sock) for sock in socks]
    ends = [mine.meet(theirs.words(), 1 << 20) for mine, theirs in (doors, doors[::-1])]
    assert ends[0] is not None and ends[1] is not None
    yield sorted(ends, key=lambda end: end._sock is None)
    for closing in (*ends, *socks):
        closing.close()


def give(owner: Nearby, other: Nearby, value: int, num_bytes: int = LARGE):
    lent = owner.lend(num_bytes)
    lent.memory[:num_bytes] = value
    return lent.number, other.borrow(lent.number, num_bytes)


def test_both_ends_give_without_a_copy_and_take_back(met):
    for owner, other in (met, met[::-1]):
        for value in range(10):
            number, got = give(owner, other, value)
            assert number == 0 and (got == value).all()
            got[:] = 99  # ours to change
            del got


def test_a_buffer_in_use_is_not_written_again(met):
    owner, other = met
    held = [give(owner, other, value) for value in range(4)]
    assert len({number for number, _ in held}) == 4
    assert all((got == value).all() for value, (_, got) in enumerate(held))


def test_few_buffers_serve_a_peer_that_lets_go(met):
    owner, other = met
    for value in range(50):
        give(owner, other, value)
    assert len(owner._own) <= FEW


def test_larger_payloads_take_the_place_of_smaller_ones(met):
    owner, other = met
    give(owner, other, 1, 1 << 17)
    gc.collect()
    _, got = give(owner, other, 2, 1 << 19)
    assert (got == 2).all()
    give(owner, other, 3, 1 << 19)
    assert [memory.nbytes >= 1 << 19 for memory in owner._own.values()].count(False) == 0
    assert len(other._theirs) <= 2


def test_arrays_outlive_the_connection(met):
    owner, other = met
    _, got = give(owner, other, 5)
    owner.close()
    other.close()
    assert (got == 5).all()
    del got


def sealed(size: int, seals: int) -> int:
    descriptor = os.memfd_create("liar", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size)
    if seals:
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


@pytest.mark.parametrize(
    ("size", "announced", "seals", "words"),
    [
        (4096, 4096, 0, "not sealed against shrinking"),
        (4096, 4096, 4, "not sealed against shrinking"),  # against growing only
        (4096, 8192, 2, "4,096 bytes was announced as 8,192"),
        (1 << 21, 1 << 21, 2, "too large"),
    ],
)
def test_memory_that_could_vanish_is_refused(met, size, announced, seals, words):
    liar, other = met
    descriptor = sealed(size, seals)
    socket.send_fds(liar._sock, [_WORD.pack(_NEW, 7, announced)], [descriptor])
    os.close(descriptor)
    with pytest.raises(PeerError, match=words):
        other.borrow(7, 100)
    assert descriptors("liar") == []


def test_a_plain_file_is_refused(met, tmp_path):
    liar, other = met
    with (tmp_path / "file").open("wb+") as file:
        file.truncate(4096)
        socket.send_fds(liar._sock, [_WORD.pack(_NEW, 7, 4096)], [file.fileno()])
    with pytest.raises(PeerError, match="not sealed"):
        other.borrow(7, 100)


def test_no_owner_can_shrink_what_it_gave(met):
    owner, other = met
    _, got = give(owner, other, 1)
    with pytest.raises(PermissionError):
        os.ftruncate(descriptors("memfd:trainfleet")[0], 0)
    assert (got == 1).all()


@pytest.mark.parametrize("word", [b"x", _WORD.pack(b"?", 1, 2), _WORD.pack(_NEW, 1, 4096), b"y" * 100])
def test_words_that_nobody_says_are_refused(met, word):
    liar, other = met
    liar._sock.send(word)
    with pytest.raises(PeerError):
        other.borrow(0, 100)


def test_numbers_that_were_never_given_are_no_harm(met):
    liar, other = met
    liar._sock.send(_WORD.pack(_FREE, 12345, 0))
    assert other.lend(LARGE) is not None
    with pytest.raises(PeerError, match=r"of 1,000,000,000 bytes lies in a shared buffer of"):
        number, _ = give(liar, other, 1)
        other.borrow(number, 1_000_000_000)


def test_strangers_at_the_door_are_sent_away():
    ours, theirs = sockets()
    left, right = Door(ours), Door(theirs)
    strangers = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)]
    for stranger, door in zip(strangers, (left, right)):
        stranger.connect(b"\0trainfleet-" + door.words()["door"].encode())
        stranger.send(b"0" * 32)
        stranger.settimeout(5)
    ends = [left.meet(right.words(), LARGE), right.meet(left.words(), LARGE)]
    listening, calling = sorted(ends, key=lambda end: end._sock is not None)
    assert (give(calling, listening, 3)[1] == 3).all()
    for stranger in strangers:
        with contextlib.suppress(ConnectionResetError):
            assert stranger.recv(1) == b""
    for closing in (*ends, *strangers, ours, theirs):
        closing.close()


def test_ends_with_something_in_between_do_not_pass_it_by():
    a, proxy_left = sockets()
    proxy_right, b = sockets()
    left, right = Door(a), Door(b)
    assert left.meet(right.words(), 1) is None
    assert left.meet(left.words(), 1) is None
    for closing in (left, right, a, b, proxy_left, proxy_right):
        closing.close()


def descriptors(name: str) -> list[int]:
    """Open files of this process whose link has that in it."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if name in str(entry.readlink()):
                found.append(int(entry.name))
    return found


def feed(port: int, frames: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as sock, Channel(sock) as channel:
        assert channel.recv(10).kind == "go"
        for n in range(frames):
            channel.send("batch", {"n": n}, {"x": np.full(1 << 17, n, np.int64)})
        channel.recv(30)


@pytest.fixture
def feeder():
    """A process that sends until it is told to end, and our channel to it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        context = multiprocessing.get_context("fork")
        process = context.Process(target=feed, args=(listener.getsockname()[1], 1000), daemon=True)
        process.start()
        sock, _ = listener.accept()
    with Channel(sock, limits=Limits(stall=timedelta(seconds=5))) as channel:
        yield process, channel
    process.kill()
    process.join(5)


def test_two_processes_share_memory_and_a_kill_leaves_nothing(feeder):
    process, channel = feeder
    channel.send("go")
    for n in range(200):
        body = channel.recv(10).body
        assert (body["x"] == n).all()
        del body
    assert channel._nearby is not None and len(channel._nearby._theirs) >= 1, "it went through the socket"
    held = channel.recv(10).body["x"]
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(PeerError):
        while True:
            channel.recv(10)
    assert (held == 200).all(), "what is in use stays"
    channel.close()
    del held
    gc.collect()
    assert descriptors("memfd:trainfleet") == []
    assert "memfd:trainfleet" not in Path("/proc/self/maps").read_text()


def test_a_receiver_that_holds_everything_gets_everything():
    """When no buffer is free the payload takes the connection, in its place in the order."""
    a, b = sockets()
    with Channel(a) as ours, Channel(b) as theirs:
        ours.send("x")
        theirs.send("x")
        assert ours.recv(1) and theirs.recv(1)
        count = 80
        sender = threading.Thread(
            target=lambda: [ours.send("b", {"n": n}, np.full(LARGE, n, np.uint8)) for n in range(count)]
        )
        sender.start()
        held = [theirs.recv(10) for _ in range(count)]
        sender.join()
        assert all(m.head["n"] == n and (m.body == n).all() for n, m in enumerate(held))
        assert len(ours._nearby._own) < count, "some went through the socket"
