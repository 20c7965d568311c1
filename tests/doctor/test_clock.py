from __future__ import annotations

import pytest

from trainfleet.doctor import clock


def verdict(monkeypatch, *, wall=None, mono=None) -> tuple[str, str]:
    if wall is not None:
        monkeypatch.setattr(clock.time, "time", wall)
    if mono is not None:
        monkeypatch.setattr(clock.time, "monotonic", mono)
    (found,) = clock.check_clock()
    return found.verdict, found.fact


def test_a_clock_that_jumps_is_told(monkeypatch):
    ticks = iter(float(second) for second in range(1000))
    how, fact = verdict(monkeypatch, wall=lambda: next(ticks) + 4e9)
    assert how == "note" and "jumped" in fact


def test_a_clock_that_stands_still_is_told(monkeypatch):
    how, fact = verdict(monkeypatch, mono=lambda: 1.0)
    assert how == "no" and "stands still" in fact


def test_a_clock_from_before_this_installation_is_told(monkeypatch):
    real = clock.time.time
    how, fact = verdict(monkeypatch, wall=lambda: real() - 20 * 365 * clock.DAY)
    assert how == "no" and "was made on" in fact


@pytest.mark.parametrize(("seconds", "where"), [(60.0, "ahead of"), (-60.0, "behind")])
def test_a_clock_unlike_that_of_the_disk_is_told(monkeypatch, seconds, where):
    real = clock.time.time
    monkeypatch.setattr(clock, "_built", lambda: 0.0)
    how, fact = verdict(monkeypatch, wall=lambda: real() + seconds)
    assert how == "note" and where in fact and "60.0 s" in fact


def test_what_chrony_says_is_told(monkeypatch):
    said = "Reference ID    : 0A000001 (ntp)\nSystem time     : 7.250000000 seconds slow of NTP time\n"
    monkeypatch.setattr(clock.shutil, "which", lambda name: "/usr/bin/" + name)
    monkeypatch.setattr(
        clock.subprocess, "run", lambda *given, **how: clock.subprocess.CompletedProcess([], 0, said, "")
    )
    how, fact = verdict(monkeypatch)
    assert how == "note" and "7.2 s off" in fact
