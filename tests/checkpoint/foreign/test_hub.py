"""Weights of the hub come from its cache, and where they cannot be had a sentence says so."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from held import Held
from safetensors.numpy import save_file

from trainfleet.checkpoint.foreign.hub import folder_of_hub
from trainfleet.checkpoint.weights import load_weights
from trainfleet.errors import CheckpointError


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with one model in it."""
    (tmp_path / "there").mkdir()
    (tmp_path / "empty").mkdir()
    save_file({"w": np.arange(3, dtype=np.float32)}, tmp_path / "there" / "model.safetensors")

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        if not (tmp_path / name).is_dir():
            raise OSError(f"{name} is not in the cache\nand much more")
        return str(tmp_path / name)

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download))
    return tmp_path


def test_a_name_of_the_hub_stands_for_its_weights(hub: Path) -> None:
    model = Held(w=np.zeros(3, np.float32))
    load_weights("hf:there", model)
    assert model.value["w"].tolist() == [0.0, 1.0, 2.0]


def test_what_cannot_be_had_is_said(hub: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'missing' cannot be had from the Hugging .* cache$") as caught:
        folder_of_hub("hf:missing")
    assert "HF_HUB_OFFLINE" in (caught.value.hint or "")
    with pytest.raises(CheckpointError, match="no safetensors files"):
        folder_of_hub("hf:empty")
