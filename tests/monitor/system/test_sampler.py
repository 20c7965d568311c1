from __future__ import annotations

import os
import socket
import sys
import time
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from trainfleet.monitor.system import sampler
from trainfleet.monitor.system.sampler import SystemSampler, get_system_stats


def burn(seconds: float) -> None:
    ends = time.process_time() + seconds
    while time.process_time() < ends:
        pass


def test_one_call_tells_all_that_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "_samplers", {})
    stats = get_system_stats()
    assert stats.cpu_percent is not None and 0 <= stats.cpu_percent <= 100
    assert stats.process_memory_bytes == pytest.approx(psutil.Process().memory_info().rss, rel=0.1)
    assert stats.memory_total_bytes == psutil.virtual_memory().total
    assert stats.disk_free_bytes == pytest.approx(psutil.disk_usage(".").free, rel=0.05)
    assert stats.network and stats.disk_written_bytes_per_second is not None
    assert set(stats.flat()) >= {"cpu_percent", "process_cpu_percent", "memory_available_bytes", "disk_free_bytes"}


def test_a_busy_process_is_seen() -> None:
    look = SystemSampler(device="cpu")
    began = time.monotonic()
    burn(0.3)
    stats = look.look()
    expected = 100 * 0.3 / (time.monotonic() - began)
    assert stats.process_cpu_percent == pytest.approx(expected, abs=25) and stats.cpu_percent is not None
    assert stats.cpu_percent > 0


@pytest.mark.skipif(sys.platform != "linux", reason="the loopback is called lo on Linux")
def test_bytes_of_the_network_are_those_that_were_sent() -> None:
    look = SystemSampler(device="cpu")
    began = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as sender:
        receiver, _ = listener.accept()
        with receiver:
            for _ in range(50):
                sender.sendall(bytes(100_000))
                got = 0
                while got < 100_000:
                    got += len(receiver.recv(1 << 17))
    time.sleep(0.15)
    stats = look.look()
    rate = 5e6 / (time.monotonic() - began)
    assert stats.network["lo"].sent_bytes_per_second > 0.8 * rate


def test_two_looks_in_a_moment_tell_the_rates_of_the_one_before() -> None:
    look = SystemSampler(device="cpu")
    time.sleep(0.12)
    first = look.look()
    second = look.look()
    assert first.process_cpu_percent == second.process_cpu_percent is not None


def test_a_machine_that_tells_nothing_gives_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise FileNotFoundError("/proc is not there")

    for name in ("cpu_times", "virtual_memory", "disk_io_counters", "net_io_counters"):
        monkeypatch.setattr(psutil, name, refuse)
    monkeypatch.setattr(psutil.Process, "cpu_times", refuse)
    monkeypatch.setattr(sampler, "resident_bytes", refuse)
    for name in ("memory_limit", "memory_left"):
        monkeypatch.setattr(sampler, name, lambda: None)
    look = SystemSampler("/is/not/there", device="cpu")
    time.sleep(0.12)
    assert look.look().flat() == {}


@pytest.mark.parametrize(
    ("grown", "percent"),
    [
        ({"idle": 0.24}, 0.0),  # sum() - idle - iowait would fall, by 7e-12 s
        ({"user": 0.25}, 100.0),
        ({"user": 0.25, "guest": 0.25, "idle": 0.75}, 25.0),
        ({"iowait": -0.5, "idle": 0.75, "system": 0.25}, 25.0),
        ({}, None),
    ],
)
def test_processor_is_as_busy_as_its_counters_say(
    monkeypatch: pytest.MonkeyPatch, grown: dict[str, float], percent: float | None
) -> None:
    counted = {"user": 6884.29, "nice": 1.2, "system": 118.74, "idle": 40639.46, "iowait": 65.22, "guest": 3.3}
    scputimes = namedtuple("scputimes", counted)  # type: ignore[misc]
    monkeypatch.setattr(psutil, "cpu_times", lambda: scputimes(**counted))
    monkeypatch.setattr(sampler, "SHORTEST_SECONDS", 0.0)
    look = SystemSampler(device="cpu")
    counted.update({kind: counted[kind] + seconds for kind, seconds in grown.items()})
    assert look.look().cpu_percent == pytest.approx(percent, abs=1e-6)


def test_interfaces_may_come_go_and_begin_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: dict[str, int] = {}
    monkeypatch.setattr(
        psutil,
        "net_io_counters",
        lambda **kwargs: {name: SimpleNamespace(bytes_recv=n, bytes_sent=0) for name, n in counted.items()},
    )
    monkeypatch.setattr(sampler, "SHORTEST_SECONDS", 0.0)
    counted.update(eth0=100, eth1=100)
    look = SystemSampler(device="cpu")
    time.sleep(0.01)
    counted.update(eth0=200, eth2=5)
    counted.pop("eth1")
    assert set(look.look().network) == {"eth0"}
    counted.update(eth0=50, eth1=100)
    assert set(look.look().network) == {"eth2"}
    assert set(look.look().network) == {"eth0", "eth1", "eth2"}


def test_a_forked_process_tells_of_itself() -> None:
    look = SystemSampler(device="cpu")
    burn(0.2)
    if (child := os.fork()) == 0:
        seen = [look.look().process_cpu_percent]
        time.sleep(0.15)
        seen.append(look.look().process_cpu_percent)
        os._exit(0 if seen[0] is None and seen[1] is not None and seen[1] < 90 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_container_with_less_than_the_machine_is_what_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "memory_limit", lambda: 1000)
    monkeypatch.setattr(sampler, "memory_left", lambda: 400)
    stats = SystemSampler(device="cpu").look()
    assert (stats.memory_limit_bytes, stats.memory_available_bytes) == (1000, 400)


def test_a_rank_tells_its_own_and_the_first_of_a_host_all(tmp_path: Path) -> None:
    look = SystemSampler(tmp_path, device="cpu")
    time.sleep(0.12)
    assert "cpu_percent" in look.numbers() and set(look.numbers_of_a_rank()) == {
        "process_cpu_percent",
        "process_memory_bytes",
    }
