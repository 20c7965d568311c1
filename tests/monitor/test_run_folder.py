from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainfleet.errors import StoreError
from trainfleet.monitor.run_folder import RunFolder


def test_a_folder_is_made_and_left_clean(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "runs" / "small")
    folder.create()
    folder.create()
    assert list(folder.path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_refused_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/run")):
        with pytest.raises(StoreError, match=f"run folder {place} cannot be written: ") as caught:
            RunFolder(place).create()
        assert caught.value.hint


def test_an_earlier_run_is_set_aside_and_not_deleted(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "small")
    assert folder.set_aside() is None
    for number in (1, 2):
        folder.create()
        assert folder.set_aside() is None, "an empty folder is nothing to keep"
        folder.metrics.write_text(str(number))
        assert folder.set_aside() == tmp_path / f"small.{number}"
    assert (tmp_path / "small.1" / "metrics.jsonl").read_text() == "1"
    assert not folder.path.exists()


def test_the_recipe_is_written_whole(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.create()
    folder.write_recipe("train: {steps: 3}  # ü\n")
    assert folder.recipe.read_text(encoding="utf-8") == "train: {steps: 3}  # ü\n"


def test_each_start_adds_its_environment(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_environment(world_size=2)
    folder.write_environment(world_size=4)
    entries = json.loads(folder.environment.read_text())
    assert [entry["world_size"] for entry in entries] == [2, 4]
    assert entries[0]["packages"]["numpy"] and entries[0]["python"] and entries[0]["memory_bytes"] > 1e8


def test_no_environment_variable_reaches_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    folder = RunFolder(tmp_path)
    folder.write_environment()
    assert "hunter2" not in folder.environment.read_text()
