from __future__ import annotations

import logging
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from trainfleet.monitor import journal as module
from trainfleet.monitor.journal import Journal


@contextmanager
def full_after(size: int) -> Iterator[None]:
    """Every file of this process ends at `size` bytes, as a disk does: a write across it is cut short."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_loses_nothing_and_tears_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal(tmp_path / "x.log", separator=b"\n")
    journal.append(b"first")
    with full_after(10):  # "second" would end at 13
        journal.append(b"second")
        journal.append(b"third")
        assert (tmp_path / "x.log").read_bytes() == b"first\n"
    journal.append(b"fourth")
    assert (tmp_path / "x.log").read_bytes() == b"first\nsecond\nthird\nfourth\n"
    journal.close()
    told = [record.message for record in caplog.records]
    assert len(told) == 2 and "cannot be written" in told[0] and "0 records were lost" in told[1]


def test_beyond_its_memory_the_oldest_records_are_given_up_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_PENDING", 3)
    journal = Journal(tmp_path / "x.log", separator=b"\n")
    with full_after(0):
        for number in range(5):
            journal.append(str(number).encode())
    journal.append(b"5")
    assert (tmp_path / "x.log").read_bytes() == b"3\n4\n5\n"
    assert "3 records were lost" in caplog.text


def test_a_disk_that_stays_full_is_reported_again_at_the_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal(tmp_path / "x.log")
    with full_after(0):
        journal.append(b"a")
        journal.close()
    assert "lacks 1 records" in caplog.text


def test_a_record_torn_by_a_kill_does_not_swallow_the_next_one(tmp_path: Path) -> None:
    (tmp_path / "x.log").write_bytes(b"whole\nto")
    journal = Journal(tmp_path / "x.log", separator=b"\n")
    journal.append(b"next")
    journal.close()
    assert (tmp_path / "x.log").read_bytes() == b"whole\nto\nnext\n"


def test_a_place_that_cannot_be_opened_is_a_warning_not_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        journal = Journal(tmp_path / "file" / "x.log")
        journal.append(b"a")
        journal.append(b"b")
        journal.close()
        journal.close()
    assert caplog.text.count("cannot be written") == 1
