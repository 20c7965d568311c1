"""The reader of a distributed checkpoint's metadata runs alone, under limits, and without torch."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys

import pytest

from trainfleet.checkpoint.foreign import dcp_metadata


def answer(place):
    command = [sys.executable, "-I", dcp_metadata.__file__, str(place)]
    done = subprocess.run(command, capture_output=True, timeout=60, check=True)
    return json.loads(done.stdout)


def test_it_says_what_torch_wrote(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    import torch.distributed.checkpoint as torch_dcp

    state = {"model": {"w": torch.zeros(2, 3)}, "lr": 0.1}
    torch_dcp.save(state, checkpoint_id=tmp_path / "x", no_dist=True)
    found = answer(tmp_path / "x" / ".metadata")
    (tensor,) = found["tensors"]
    assert found["others"] == 1 and tensor["keys"] == ["model", "w"]
    assert (tensor["dtype"], tensor["shape"]) == ("float32", [2, 3])
    (chunk,) = tensor["chunks"]
    assert (chunk["offsets"], chunk["shape"], chunk["file"]) == ([0, 0], [2, 3], "__0_0.distcp")
    assert 0 <= chunk["begin"] < chunk["begin"] + chunk["bytes"] <= (tmp_path / "x" / "__0_0.distcp").stat().st_size


@pytest.mark.parametrize("harm", [os.getcwd, print, eval, getattr, dict, Exception], ids=str)
def test_it_makes_nothing_that_is_not_known(tmp_path, harm):
    (tmp_path / "x").write_bytes(pickle.dumps(harm))
    assert "which does not belong there" in answer(tmp_path / "x")["error"]


def test_a_class_of_torch_is_a_stub_there():
    made = dcp_metadata._Unpickler(io.BytesIO())
    for module, name in (("torch", "Size"), ("torch.distributed.checkpoint.metadata", "Metadata"), ("pathlib", "Path")):
        assert made.find_class(module, name).__module__ in (dcp_metadata.__name__, "builtins")


def test_a_missing_file_is_told(tmp_path):
    assert "No such file" in answer(tmp_path / "absent")["error"]


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux")
def test_what_would_fill_memory_is_ended(tmp_path):
    (tmp_path / "x").write_bytes(b"\x80\x04(" + b"]" * 200 + b"N\x72\xff\xff\xff\x7f.")
    assert "more memory" in answer(tmp_path / "x")["error"]
