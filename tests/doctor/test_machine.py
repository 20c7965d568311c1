from __future__ import annotations

import socket
from collections import namedtuple

from trainfleet import container
from trainfleet.doctor import machine
from trainfleet.doctor.machine import GIB


def test_a_small_shared_memory_is_told(monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage(GIB, GIB, GIB // 16))
    shared = list(machine.check_memory())[-1]
    assert shared.verdict == "note" and "--shm-size" in shared.remedy


def test_the_memory_of_a_container_counts_where_it_is_less(monkeypatch):
    monkeypatch.setattr(container, "memory_limit", lambda: GIB)
    monkeypatch.setattr(container, "memory_left", lambda: GIB // 2)
    memory = next(machine.check_memory())
    assert memory.verdict == "note" and "0.5 GiB free, this container may use 1.0 GiB" in memory.fact


def test_a_closed_loopback_is_told(monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(machine.socket, "create_server", refuse)
    loopback, _ = machine.check_network()
    assert loopback.verdict == "no" and "Network is unreachable" in loopback.fact


def test_a_host_name_that_does_not_resolve_is_told(monkeypatch):
    def unknown(name: str) -> str:
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(machine.socket, "gethostbyname", unknown)
    _, name = machine.check_network()
    assert name.verdict == "note" and "GLOO_SOCKET_IFNAME" in name.remedy


def test_an_old_python_is_told(monkeypatch):
    monkeypatch.setattr(machine.sys, "version_info", (3, 9, 1))
    assert next(iter(machine.check_python())).verdict == "no"


def test_a_container_with_fewer_cores_is_told(monkeypatch):
    monkeypatch.setattr(container, "core_quota", lambda: 0.5)
    (cores,) = machine.check_processor({})
    assert (
        cores.verdict == "note"
        and "may use the time of 0.5" in cores.fact
        and "no more than 1 process," in cores.remedy
    )


def test_threads_count_against_the_quota_too(monkeypatch):
    monkeypatch.setattr(container, "allowed_cores", lambda: 8)
    monkeypatch.setattr(container, "core_quota", lambda: 2.0)
    assert [found.subject for found in machine.check_processor({"OMP_NUM_THREADS": "2"})] == ["cores"]
    _, threads = machine.check_processor({"OMP_NUM_THREADS": "8"})
    assert "8 threads on 2 cores" in threads.fact and "OMP_NUM_THREADS=2" in threads.remedy
    _, threads = machine.check_processor({"MKL_NUM_THREADS": "all"})
    assert "is no number of threads" in threads.fact


def test_an_interface_that_is_not_there_is_told():
    for variables in ({"GLOO_SOCKET_IFNAME": "nonsense"}, {"NCCL_SOCKET_IFNAME": "=l"}):
        (wrong,) = (found for found in machine.check_network(variables) if found.subject == "interface")
        assert wrong.verdict == "no" and next(iter(variables)) in wrong.remedy
    fine = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "l,^docker"}
    assert all(found.subject != "interface" for found in machine.check_network({**fine}) if "docker" not in found.fact)


def test_few_processes_are_told(monkeypatch):
    monkeypatch.setattr(container, "process_limit", lambda: 100)
    _, processes = machine.check_limits()
    assert processes.verdict == "note" and "at most 100" in processes.fact and "--pids-limit" in processes.remedy
