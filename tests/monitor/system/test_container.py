from __future__ import annotations

from pathlib import Path

import pytest

from trainfleet.monitor.system import container


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(container, "_ROOT", tmp_path / "cgroup")
    monkeypatch.setattr(container, "_GROUPS", tmp_path / "groups")
    container._limited.cache_clear()
    yield tmp_path  # type: ignore[misc]
    container._limited.cache_clear()


def put(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def test_without_groups_there_is_no_limit() -> None:
    assert container.memory_limit_bytes() is None


def test_version_2_has_the_limit_of_the_tightest_group_that_it_is_in(root: Path) -> None:
    (root / "groups").write_text("0::/pod/box\n")
    put(root / "cgroup/pod/box", memory__max="max", memory__current=500)
    put(root / "cgroup/pod", memory__max=1000, memory__current=700, memory__stat="anon 1\ninactive_file 50")
    assert container.memory_limit_bytes() == (1000, 350)


def test_a_container_sees_its_group_as_the_root(root: Path) -> None:
    (root / "groups").write_text("0::/../../elsewhere\n")
    put(root / "cgroup", memory__max=1000, memory__current=2000)
    assert container.memory_limit_bytes() == (1000, 0)


def test_version_1_has_it_under_other_names(root: Path) -> None:
    (root / "groups").write_text("5:cpu,cpuacct:/\n4:memory:/box\n0::/\ngarbage\n")
    put(root / "cgroup/memory", memory__limit_in_bytes=9223372036854771712, memory__usage_in_bytes=5)
    assert container.memory_limit_bytes() is None
    put(root / "cgroup/memory/box", memory__limit_in_bytes=1000, memory__usage_in_bytes=400)
    container._limited.cache_clear()
    assert container.memory_limit_bytes() == (1000, 600)


def test_what_vanishes_or_is_no_number_is_left_out(root: Path) -> None:
    (root / "groups").write_text("0::/\n")
    put(root / "cgroup", memory__max=1000, memory__current="much", memory__stat="x")
    assert container.memory_limit_bytes() == (1000, 1000)
    (root / "cgroup/memory.max").unlink()
    assert container.memory_limit_bytes() is None
