from __future__ import annotations

import socket
import threading
import time

import pytest

from trainfleet.net.sockets import DEAD_SECONDS, close_gently, read_exactly, tune


def test_small_messages_go_at_once_and_the_dead_are_found():
    with socket.socket() as sock:
        tune(sock)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == DEAD_SECONDS * 1000


def test_exactly_so_many_bytes_are_read_and_the_rest_stays():
    here, there = socket.socketpair()
    with here, there:
        there.sendall(b"abcdef")
        assert read_exactly(here, 4, time.monotonic() + 1) == b"abcd"
        assert here.recv(9) == b"ef"
        there.sendall(b"ab")
        there.close()
        with pytest.raises(ConnectionResetError):
            read_exactly(here, 4, time.monotonic() + 1)


def test_bytes_that_trickle_in_do_not_move_the_deadline():
    here, there = socket.socketpair()
    ended = threading.Event()

    def trickle() -> None:
        while not ended.wait(0.02):
            there.sendall(b"x")

    thread = threading.Thread(target=trickle)
    thread.start()
    begin = time.monotonic()
    try:
        with pytest.raises(TimeoutError):
            read_exactly(here, 1000, begin + 0.3)
        assert time.monotonic() - begin < 1
    finally:
        ended.set()
        thread.join()
        here.close()
        there.close()


def test_last_words_arrive_though_theirs_were_not_read():
    with socket.create_server(("127.0.0.1", 0)) as server:
        there = socket.create_connection(server.getsockname())
        here, _ = server.accept()
        there.sendall(b"x" * 5000)
        here.sendall(b"go away")
        thread = threading.Thread(target=close_gently, args=(here,))
        thread.start()
        time.sleep(0.1)
        assert there.recv(100) == b"go away" and there.recv(100) == b""
        there.close()
        thread.join(2)
        assert not thread.is_alive() and here.fileno() == -1
