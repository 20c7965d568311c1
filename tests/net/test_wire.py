from __future__ import annotations

import socket
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainfleet.net.wire import MAX_PIECES, BlockingWire, Ended, PolledWire, Stalled, open_wire, slices


@pytest.fixture(params=[BlockingWire, PolledWire])
def ends(request):
    left, right = socket.socketpair()
    yield request.param(left, 0.3), request.param(right, 0.3)
    left.close()
    right.close()


@given(st.lists(st.integers(0, 300), max_size=30), st.integers(1, 200))
def test_slices_are_the_arrays_padded(sizes, num_bytes):
    arrays = [np.full(size, place + 1, np.uint8) for place, size in enumerate(sizes)]
    parts = list(slices(arrays, num_bytes))
    whole = b"".join(bytes(piece) for part in parts for piece in part)
    assert whole == b"".join(array.tobytes() + bytes(-array.nbytes % 64) for array in arrays)
    assert all(sum(piece.nbytes for piece in part) == num_bytes for part in parts[:-1])


def test_no_call_gathers_more_pieces_than_the_system_takes():
    assert max(len(part) for part in slices([np.ones(3, np.uint8)] * 2000)) <= MAX_PIECES


def test_bytes_arrive_as_they_were_sent(ends):
    left, right = ends
    pieces = [memoryview(bytes([i % 256]) * (i * 37 % 5000)) for i in range(400)]
    whole = b"".join(pieces)
    sender = threading.Thread(target=left.send, args=(pieces,))
    sender.start()
    got = bytearray(len(whole))
    right.fill(memoryview(got))
    sender.join()
    assert got == whole


def test_what_was_read_ahead_comes_first(ends):
    left, right = ends
    payload, next_words = bytes(range(256)) * 1024, b"digest and header" + bytes(39)
    sender = threading.Thread(target=left.send, args=([memoryview(payload + next_words + b"head")],))
    sender.start()
    got, seen = bytearray(len(payload)), []
    right.fill(memoryview(got), lambda piece: seen.append(bytes(piece)), ahead=len(next_words))
    sender.join()
    assert got == payload and b"".join(seen) == payload, "each piece is of the payload"
    for words in (next_words[:20], next_words[20:], b"head"):
        assert right.wait(1)
        got = bytearray(len(words))
        right.fill(memoryview(got))
        assert got == words
    assert not right.wait(0)


def test_a_peer_that_says_nothing_is_stalled_and_one_that_left_has_ended(ends):
    left, right = ends
    assert not right.wait(0.01)
    left.send([memoryview(b"abc")])
    assert right.wait(1)
    began = time.monotonic()
    with pytest.raises(Stalled):
        right.fill(memoryview(bytearray(10)))
    assert 0.2 < time.monotonic() - began < 3
    left.close()
    with pytest.raises(Ended):
        right.fill(memoryview(bytearray(10)))


def test_a_trickle_does_not_hold_a_slice_for_ever(ends):
    left, right = ends
    stop = threading.Event()

    def trickle() -> None:
        while not stop.wait(0.02):
            left.send([memoryview(b"x")])

    thread = threading.Thread(target=trickle)
    thread.start()
    try:
        with pytest.raises(Stalled):
            right.fill(memoryview(bytearray(1000)))
    finally:
        stop.set()
        thread.join()


def test_a_peer_that_does_not_read_is_stalled(ends):
    left, _ = ends
    with pytest.raises(Stalled):
        for _ in range(100):
            left.send([memoryview(bytes(1 << 20))])


def test_wake_ends_a_wait_in_another_thread(ends):
    left, _ = ends
    results = []
    waiter = threading.Thread(target=lambda: results.append(left.wait(20)))
    waiter.start()
    left.wake()
    waiter.join(timeout=5)
    assert results == [True]


def test_half_open_connections_are_watched_by_the_kernel():
    listener = socket.create_server(("127.0.0.1", 0))
    with listener, socket.create_connection(listener.getsockname()) as sock:
        open_wire(sock, 30)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 30_000
