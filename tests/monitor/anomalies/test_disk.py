"""A disk that fills up is told by its trend, or because the next checkpoints do not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from trainfleet.events import CheckpointSaved, StepEnded
from trainfleet.monitor.anomalies import Disk, Finding

GB = 10**9


def found(
    free: Callable[[float], float], *, minutes: int = 60, saved: Path | None = None
) -> list[tuple[float, Finding]]:
    """At which second, of steps of a second on a disk with so many GB free at a second."""
    now = 0.0
    disk = Disk(Path("run"), minutes=15.0, clock=lambda: now, free_bytes=lambda _: int(free(now) * GB))
    if saved is not None:
        disk.hear(CheckpointSaved(step=1, path=str(saved), seconds=0.1))
    findings = []
    for second in range(60 * minutes):
        now = float(second)
        ended = StepEnded(
            step=second, loss=1, learning_rate=1, grad_norm=1, samples=1, tokens=1, seconds=1, data_seconds=0
        )
        if (finding := disk.end(ended)) is not None:
            findings.append((now, finding))
    return findings


def test_a_trend_is_told_some_minutes_ahead_and_once() -> None:
    ((second, finding),) = found(lambda second: 60 - second / 60, minutes=59)
    assert 44 * 60 <= second <= 47 * 60
    assert finding.what.startswith("15.0 GB are left in run, and at the rate of the last minutes it is full in 15:00")


def test_a_disk_that_was_cleared_is_over() -> None:
    (_, begun), (_, over) = found(lambda second: 60 - second / 60 if second < 3000 else 100)
    assert not begun.is_over and over.is_over and "100 GB are free again in run" in over.what


def test_room_for_fewer_than_two_checkpoints_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "shard").write_bytes(bytes(1000))
    ((second, finding),) = found(lambda _: 1.9e-6, minutes=1, saved=tmp_path)
    assert second == 0 and finding.what == "2 kB are left in run, and a checkpoint takes 1 kB"
    assert found(lambda _: 3e-6, saved=tmp_path) == []


def test_a_checkpoint_that_comes_and_goes_is_no_trend() -> None:
    assert found(lambda second: 60 if second // 300 % 2 else 50) == []
    assert found(lambda second: 60 + second / 60) == []
    assert found(lambda second: 20 - second / 6000) == [], "33 hours"


def test_a_disk_that_does_not_answer_is_left_to_those_who_write_there() -> None:
    def broken(_: Path) -> int:
        raise OSError

    disk = Disk(Path("run"), minutes=15.0, clock=lambda: 0.0, free_bytes=broken)
    ended = StepEnded(step=1, loss=1, learning_rate=1, grad_norm=1, samples=1, tokens=1, seconds=1, data_seconds=0)
    assert disk.end(ended) is None
