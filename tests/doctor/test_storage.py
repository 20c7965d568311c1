from __future__ import annotations

import errno
import os
from collections import namedtuple

import pytest

from trainfleet.doctor import storage
from trainfleet.doctor.storage import GIB, check_disk

USAGE = namedtuple("USAGE", "total used free")


def test_a_disk_is_written_and_nothing_stays(tmp_path):
    assert [found.subject for found in check_disk(tmp_path)][:2] == ["disk", "disk speed"]
    assert list(tmp_path.iterdir()) == []
    assert "disk speed" not in [found.subject for found in check_disk(tmp_path, quick=True)]


@pytest.mark.parametrize(("free", "verdict"), [(GIB // 16, "no"), (2 * GIB, "note"), (50 * GIB, "ok")])
def test_little_room_is_told(monkeypatch, tmp_path, free, verdict):
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: USAGE(free, 0, free))
    disk = next(check_disk(tmp_path))
    assert disk.verdict == verdict and f"{free / GIB:.1f} GiB free" in disk.fact
    assert ("remove old runs" in disk.remedy) is (verdict != "ok")


@pytest.mark.parametrize(
    ("error", "said"),
    [(errno.ENOSPC, "remove old runs"), (errno.EROFS, "read-only"), (errno.EACCES, "folder of yours")],
)
def test_a_write_that_fails_says_why_and_what_to_do(monkeypatch, tmp_path, error, said):
    def fail(number: int) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(storage.os, "fsync", fail)
    disk = next(check_disk(tmp_path))
    assert disk.verdict == "no" and os.strerror(error) in disk.fact and said in disk.fact + disk.remedy


def test_files_that_run_out_are_told_though_there_is_space(monkeypatch, tmp_path):
    stat = namedtuple("stat", "f_files f_favail f_flag")
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: USAGE(GIB, 0, 9 * GIB))
    monkeypatch.setattr(storage.os, "statvfs", lambda path: stat(1_000_000, 12, 0))
    found = {each.subject: each for each in check_disk(tmp_path)}
    assert found["inodes"].verdict == "no" and "12 of 1,000,000" in found["inodes"].fact
    monkeypatch.setattr(storage.os, "statvfs", lambda path: stat(0, 0, 0))  # btrfs has no such number
    assert "inodes" not in {each.subject for each in check_disk(tmp_path)}
