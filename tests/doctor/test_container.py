from __future__ import annotations

from pathlib import Path

from trainfleet.doctor.container import core_quota, memory_limit, process_limit


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_narrowest_group_counts_also_one_above_ours(tmp_path):
    own, mounted = tmp_path / "own", tmp_path / "groups"
    own.write_text("0::/system.slice/run.service\n")
    write(mounted / "cgroup.controllers", "cpu memory pids")
    write(mounted / "system.slice" / "cpu.max", "150000 100000")
    write(mounted / "system.slice" / "run.service" / "cpu.max", "max 100000")
    write(mounted / "memory.max", "max")
    write(mounted / "system.slice" / "memory.max", "4096")
    write(mounted / "system.slice" / "run.service" / "pids.max", "64")
    assert (core_quota(own, mounted), memory_limit(own, mounted), process_limit(own, mounted)) == (1.5, 4096, 64)


def test_version_1_is_read_too(tmp_path):
    own, mounted = tmp_path / "own", tmp_path / "groups"
    own.write_text("4:memory:/job\n2:cpu,cpuacct:/job\n")
    write(mounted / "cpu,cpuacct" / "job" / "cpu.cfs_quota_us", "50000")
    write(mounted / "cpu,cpuacct" / "job" / "cpu.cfs_period_us", "100000")
    write(mounted / "cpu,cpuacct" / "cpu.cfs_quota_us", "-1")
    write(mounted / "cpu,cpuacct" / "cpu.cfs_period_us", "100000")
    write(mounted / "memory" / "job" / "memory.limit_in_bytes", "9223372036854771712")
    assert (core_quota(own, mounted), memory_limit(own, mounted)) == (0.5, None)


def test_a_group_that_cannot_be_seen_leaves_the_one_at_the_top(tmp_path):
    own, mounted = tmp_path / "own", tmp_path / "groups"
    own.write_text("0::/docker/0123\n")
    write(mounted / "cpu.max", "200000 100000")
    assert core_quota(own, mounted) == 2.0
    assert core_quota(tmp_path / "none", mounted) is None
