from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from trainfleet import container
from trainfleet.container import core_quota, memory_left, memory_limit, process_limit, usable_cores


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(container, "_MOUNTED", tmp_path / "cgroup")
    monkeypatch.setattr(container, "_OWN", tmp_path / "groups")
    container._limited.cache_clear()
    yield tmp_path
    container._limited.cache_clear()


def put(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def test_without_groups_there_is_no_limit() -> None:
    assert (core_quota(), process_limit(), memory_limit(), memory_left()) == (None, None, None, None)


def test_the_narrowest_group_counts_also_one_above_ours(root: Path) -> None:
    (root / "groups").write_text("0::/system.slice/run.service\n")
    put(root / "cgroup", cgroup__controllers="cpu memory pids", memory__max="max")
    put(root / "cgroup/system.slice", cpu__max="150000 100000", memory__max=4096, memory__current=700)
    put(root / "cgroup/system.slice/run.service", cpu__max="max 100000", pids__max=64, memory__max=9000)
    put(root / "cgroup/system.slice/run.service", memory__current=8000)
    assert (core_quota(), memory_limit(), process_limit()) == (1.5, 4096, 64)
    assert memory_left() == 1000, "that of the group which is full first"


def test_cores_are_those_that_it_may_run_on_or_has_the_time_of(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "allowed_cores", lambda: 8)
    assert usable_cores() == 8
    (root / "groups").write_text("0::/\n")
    for quota, cores in (("1000000 100000", 8), ("250000 100000", 2), ("50000 100000", 1)):
        put(root / "cgroup", cpu__max=quota)
        assert usable_cores() == cores


def test_pages_of_files_are_left(root: Path) -> None:
    (root / "groups").write_text("0::/pod/box\n")
    put(root / "cgroup/pod/box", memory__max="max", memory__current=500)
    put(root / "cgroup/pod", memory__max=1000, memory__current=700, memory__stat="anon 1\ninactive_file 50")
    assert (memory_limit(), memory_left()) == (1000, 350)


@pytest.mark.parametrize("path", ["/docker/0123", "/../../elsewhere"])
def test_a_container_sees_its_group_as_the_one_at_the_top(root: Path, path: str) -> None:
    (root / "groups").write_text(f"0::{path}\n")
    put(root / "cgroup", cpu__max="200000 100000", memory__max=1000, memory__current=2000)
    assert (core_quota(), memory_limit(), memory_left()) == (2.0, 1000, 0)


def test_version_1_has_it_under_other_names(root: Path) -> None:
    (root / "groups").write_text("4:memory:/box\n2:cpu,cpuacct:/job\n0::/\ngarbage\n")
    put(root / "cgroup/cpu,cpuacct/job", cpu__cfs_quota_us=50000, cpu__cfs_period_us=100000)
    put(root / "cgroup/cpu,cpuacct", cpu__cfs_quota_us=-1, cpu__cfs_period_us=100000)
    put(root / "cgroup/memory", memory__limit_in_bytes=9223372036854771712, memory__usage_in_bytes=5)
    assert (core_quota(), memory_limit()) == (0.5, None)
    put(root / "cgroup/memory/box", memory__limit_in_bytes=1000, memory__usage_in_bytes=400)
    container._limited.cache_clear()
    assert (memory_limit(), memory_left()) == (1000, 600)


def test_both_versions_may_be_mounted_beside_each_other(root: Path) -> None:
    (root / "groups").write_text("0::/box\n")
    put(root / "cgroup/unified/box", pids__max=7)
    assert process_limit() == 7


def test_what_vanishes_or_is_no_number_is_left_out(root: Path) -> None:
    (root / "groups").write_text("0::/\n")
    put(root / "cgroup", memory__max=1000, memory__current="much", memory__stat="x", cpu__max="1 0", pids__max="")
    (root / "cgroup" / "cpu.cfs_quota_us").write_bytes(b"\xff")
    assert (memory_limit(), memory_left(), core_quota(), process_limit()) == (1000, 1000, None, None)
    (root / "cgroup/memory.max").unlink()
    assert (memory_limit(), memory_left()) == (None, None)
