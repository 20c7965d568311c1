from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from trainfleet.net.conditions import Conditions
from trainfleet.net.crossing import Crossing, Turnstile
from trainfleet.net.loop import Door, Loop
from trainfleet.net.traffic import Traffic


class Bench:
    """Traffic with one crossing between two ends of ours."""

    def __init__(self, conditions: Conditions) -> None:
        self.passed: list[int] = []
        turnstiles = (Turnstile(conditions.bits_per_second_up), Turnstile(conditions.bits_per_second_down))
        self.loop = Loop("of a test", at_end=lambda: None)
        self.traffic = Traffic(self.loop, turnstiles, self.passed.append)
        self.client, inner_client = socket.socketpair()
        self.target, inner_target = socket.socketpair()
        for sock in (self.client, self.target):
            sock.settimeout(5)
        self.crossing = Crossing(number=1, client=Door(inner_client, self.loop))
        self.traffic.crossings[1] = self.crossing
        self.crossing.join(Door(inner_target, self.loop), conditions, turnstiles, 0)
        self.traffic.join(self.crossing)
        self.loop.start()

    def close(self) -> None:
        self.loop.call(lambda: self.traffic.drop(self.crossing, reset=False))
        self.loop.close()
        self.client.close()
        self.target.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench(Conditions(bits_per_second_up=8e6))
    yield bench
    bench.close()


def test_what_has_passed_is_told_in_total(bench):
    bench.client.sendall(b"abc")
    assert bench.target.recv(10) == b"abc"
    bench.target.sendall(b"defg")
    assert bench.client.recv(10) == b"defg"
    assert bench.loop.call(lambda: bench.passed) == [3, 7]


def test_one_that_ends_both_ways_is_forgotten(bench):
    bench.client.shutdown(socket.SHUT_WR)
    assert bench.target.recv(1) == b""
    assert bench.loop.call(lambda: len(bench.traffic.crossings)) == 1
    bench.target.close()
    assert bench.client.recv(1) == b""
    ends = time.monotonic() + 2
    while bench.loop.call(lambda: len(bench.traffic.crossings)) and time.monotonic() < ends:
        time.sleep(0.01)
    assert not bench.loop.call(lambda: bench.crossing.is_open)
    assert bench.loop.call(lambda: bench.traffic.count().reset) == 0


def test_a_lane_that_was_full_when_its_bytes_were_swallowed_hears_its_source_again():
    bench = Bench(Conditions(bits_per_second_up=80e6))
    bench.client.settimeout(0.2)
    with pytest.raises(TimeoutError):  # the target does not read
        for _ in range(1000):
            bench.client.sendall(bytes(1 << 16))
    assert bench.loop.call(lambda: bench.crossing.flows[0].is_full)

    def fail() -> None:
        bench.traffic.state = "half_open"
        bench.traffic.swallow()

    bench.loop.call(fail)
    bench.client.settimeout(5)
    bench.client.sendall(bytes(1 << 20))
    assert bench.loop.call(lambda: bench.crossing.has_lost_bytes)
    assert bench.loop.call(lambda: bench.traffic.counters.swallowed_bytes) > 1 << 19
    bench.close()
