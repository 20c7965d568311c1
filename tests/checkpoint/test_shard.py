"""A data file, read by a library that knows nothing of us."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.numpy
from held import Held

from trainfleet.checkpoint import Checkpointer
from trainfleet.state import ShardedArray
from trainfleet.store import FileStore


def data_file(folder, **value):
    with Checkpointer(FileStore(folder)) as checkpointer:
        checkpointer.save(1, m=Held(**value))
    (path,) = folder.glob("*/*.safetensors")
    return path


def test_whole_arrays_are_read_by_safetensors_under_their_paths(tmp_path):
    state = {
        "w": np.arange(6, dtype=np.float32).reshape(2, 3),
        "deep": {"n": np.array(5), "flags": np.array([True, False, True])},
        "ü": np.ones(1, np.int8),
    }
    found = safetensors.numpy.load_file(data_file(tmp_path, **state))
    assert found.keys() == {"m/w", "m/deep/n", "m/deep/flags", "m/ü"}
    for path, array in (
        ("m/w", state["w"]),
        ("m/deep/n", state["deep"]["n"]),
        ("m/deep/flags", state["deep"]["flags"]),
    ):
        assert found[path].dtype == array.dtype
        assert np.array_equal(found[path], array)


def test_an_empty_shard_is_a_safetensors_file_too(tmp_path):
    assert safetensors.numpy.load_file(data_file(tmp_path, n=1, e=np.zeros((0, 3)))) == {}


def test_dtypes_that_safetensors_has_not_are_kept_as_bytes(tmp_path):
    array = np.array([1 + 2j, 3j])
    found = safetensors.numpy.load_file(data_file(tmp_path, c=array))
    assert found["m/c"].view(np.complex128).tolist() == array.tolist()


def test_bfloat16_is_read_by_torch(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    import safetensors.torch

    tensor = torch.randn(3, 5).bfloat16()
    found = safetensors.torch.load_file(data_file(tmp_path, w=tensor))
    assert torch.equal(found["m/w"], tensor)


def test_every_byte_is_accounted_for_by_the_index(tmp_path):
    piece = ShardedArray(name="w", global_shape=(4, 4), offsets=(0, 0), local=np.ones((4, 4)))
    path = data_file(tmp_path, w=piece, b=np.zeros(7, np.int8))
    index = json.loads(path.with_suffix(".json").read_text())
    ends = [index["data"]["header_bytes"], *(p["end"] for p in index["pieces"])]
    assert [p["begin"] for p in index["pieces"]] == ends[:-1]
    assert ends[-1] == index["data"]["bytes"] == path.stat().st_size
