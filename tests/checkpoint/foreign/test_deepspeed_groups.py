"""The program that reads DeepSpeed's settings knows the names that belong there, and runs nothing."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from trainfleet.checkpoint.foreign import deepspeed_groups


def asked(file: Path) -> dict[str, Any]:
    command = [sys.executable, "-I", str(deepspeed_groups.__file__), str(file)]
    return json.loads(subprocess.run(command, capture_output=True, timeout=60).stdout)


def written(folder: Path, content: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    file = folder / "optimizer_state.pt"
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", content)
    return file


def test_plain_settings_are_told_and_others_left_out(tmp_path: Path) -> None:
    groups = [{"lr": 0.5, "betas": (0.9, 0.99), "fused": None, "params": [1, 2], "odd": {1: 2}}]
    file = written(tmp_path, pickle.dumps({"optimizer_state_dict": {"param_groups": groups}}))
    assert asked(file) == {"groups": [{"lr": 0.5, "betas": [0.9, 0.99], "fused": None}], "shapes": {}, "steps": 0}
    about = {"param_shapes": [{"a": (2, 3)}, {"b": ()}], "global_steps": 5, "skipped_steps": 1}
    file = written(tmp_path, pickle.dumps(about))
    assert asked(file) == {"groups": [], "shapes": {"a": [2, 3], "b": []}, "steps": 4}


@pytest.mark.parametrize("call", [os.getcwd, print, eval])
def test_other_names_are_refused(tmp_path: Path, call: Any) -> None:
    class Call:
        def __reduce__(self) -> Any:
            return (call, ("1",) if call is not os.getcwd else ())

    answer = asked(written(tmp_path, pickle.dumps({"param_groups": [], "x": Call()})))
    assert "does not belong there" in answer["error"]


def test_what_is_packed_is_refused(tmp_path: Path) -> None:
    content = pickle.dumps({"param_groups": [], "x": b"0" * 100_000})
    assert "compressed" in asked(written(tmp_path, content, zipfile.ZIP_DEFLATED))["error"]
