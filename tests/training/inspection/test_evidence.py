"""What is kept can be read again, is bounded, and never ends a run."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch
from training.inspection.test_finding import FINDING

from trainfleet.errors import DataError
from trainfleet.training.inspection import evidence
from trainfleet.training.inspection.evidence import (
    place_for,
    read_batches,
    read_finding,
    write_batches,
    write_finding,
)


def batches() -> list[object]:
    x = torch.arange(6.0).view(2, 3)
    return [{"x": x, "y": (x[0].long(), "name")}, {"x": x.t(), "y": (x[1].long(), "other")}]


def test_batches_and_finding_come_back(tmp_path: Path) -> None:
    place = place_for(tmp_path, 812)
    assert place == tmp_path / "anomalies" / "step_000812"
    assert write_finding(place, FINDING) and write_batches(place, batches())
    assert str(read_finding(place)) == str(FINDING)
    like = [{"x": torch.zeros(2, 3), "y": (torch.zeros(3).long(), each)} for each in ("name", "other")]
    first, second = read_batches(place / "batch.safetensors", like)
    assert torch.equal(first["x"], torch.arange(6.0).view(2, 3)) and first["y"][1] == "name"
    assert torch.equal(second["x"], torch.arange(6.0).view(2, 3).t())


def test_another_structure_and_a_broken_file_are_refused(tmp_path: Path) -> None:
    write_batches(tmp_path, batches())
    with pytest.raises(DataError, match="holds 2 micro-batches with arrays at"):
        read_batches(tmp_path / "batch.safetensors", [torch.ones(2)])
    (tmp_path / "batch.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    with pytest.raises(DataError, match="holds no micro-batches that can be read"):
        read_batches(tmp_path / "batch.safetensors", batches())
    with pytest.raises(DataError, match="holds no finding that can be read"):
        read_finding(tmp_path)


def test_size_and_number_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(evidence, "MOST_BYTES", 90)
    monkeypatch.setattr(evidence, "MOST_KEPT", 2)
    with caplog.at_level(logging.WARNING):
        assert not write_batches(tmp_path, batches())
    assert "hold 96 bytes, more than 90" in caplog.text
    for step in (1, 2):
        assert write_finding(place_for(tmp_path, step), replace(FINDING, step=step))  # type: ignore[arg-type]
    assert place_for(tmp_path, 2) is not None and place_for(tmp_path, 3) is None


def test_a_disk_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "anomalies").write_text("a file where a folder belongs")
    with caplog.at_level(logging.WARNING):
        assert not write_finding(tmp_path / "anomalies" / "step_000001", FINDING)
    assert "finding.json is not kept: " in caplog.text and "The run goes on" in caplog.text
