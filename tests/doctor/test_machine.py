from __future__ import annotations

import socket
from collections import namedtuple
from importlib import metadata

import pytest

from trainfleet.doctor import machine
from trainfleet.doctor.machine import CHECKS, GIB


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_every_check_says_something_here(check):
    findings = list(check())
    assert findings
    for finding in findings:
        assert finding.fact and (finding.verdict == "ok" or finding.remedy or finding.subject == "extras")


def test_a_full_disk_and_a_small_shared_memory_are_told(monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage(GIB, GIB, GIB // 16))
    (disk,) = machine.check_disk()
    assert disk.verdict == "no" and "0.1 GiB free" in disk.fact and "remove old runs" in disk.remedy
    shared = list(machine.check_memory())[-1]
    assert shared.verdict == "note" and "--shm-size" in shared.remedy


def test_a_folder_that_cannot_be_written_is_told(monkeypatch):
    monkeypatch.setattr(machine.os, "access", lambda path, mode: False)
    (disk,) = machine.check_disk()
    assert disk.verdict == "no" and "cannot be written" in disk.fact


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


def test_a_clock_that_jumps_or_stands_still_is_told(monkeypatch):
    walls = iter(range(100))
    monkeypatch.setattr(machine.time, "time", lambda: float(next(walls)))
    assert [finding.verdict for finding in machine.check_clock()] == ["note"]
    monkeypatch.setattr(machine.time, "monotonic", lambda: 1.0)
    assert [finding.verdict for finding in machine.check_clock()] == ["no"]


def test_an_old_python_is_told(monkeypatch):
    monkeypatch.setattr(machine.sys, "version_info", (3, 9, 1))
    assert next(iter(machine.check_python())).verdict == "no"


def test_a_missing_extra_names_the_command(monkeypatch):
    needs = ['torch>=2; extra == "torch"', 'no-such-thing>=1; extra == "x"', 'numpy>=1; extra == "x"', "numpy"]
    monkeypatch.setattr(metadata, "requires", lambda name: needs)
    (extra,) = machine.check_extras()
    assert extra.fact == f"numpy {metadata.version('numpy')}, no-such-thing is missing"
    assert (extra.verdict, extra.remedy) == ("note", 'pip install "trainfleet[x]"')


def test_a_container_with_fewer_cores_is_told(monkeypatch):
    monkeypatch.setattr(machine, "_cgroup_cores", lambda: 0.5)
    (cores,) = machine.check_processor()
    assert cores.verdict == "note" and "may use 0.5" in cores.fact
