"""Safetensors are read as the library reads them, without torch; what is no such file is refused in words."""

from __future__ import annotations

import json
import random
import struct
import tracemalloc

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save, save_file

from trainfleet.checkpoint.foreign.safetensors import arrays_in_file, arrays_in_folder
from trainfleet.errors import CheckpointError

DRAW = np.random.default_rng(0)
ARRAYS = {
    "w": DRAW.standard_normal((5, 3)).astype("f4"),
    "half": DRAW.standard_normal(4).astype("f2"),
    "n": np.array(7),
    "none": np.zeros((0, 3), "f8"),
    "flags": np.array([True, False]),
    "u": np.arange(4, dtype="u2"),
}


def equal(found, expected):
    return {array.name: (array.dtype, array.shape, array.read().tobytes()) for array in found} == {
        name: (array.dtype.name, array.shape, array.tobytes()) for name, array in expected.items()
    }


def test_every_array_comes_by_name_and_value(tmp_path):
    save_file(ARRAYS, tmp_path / "x.safetensors", metadata={"any": "thing"})
    assert equal(arrays_in_file(tmp_path / "x.safetensors"), ARRAYS)


def test_narrow_floats_of_torch_come_too(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from safetensors.torch import save_file as save_tensors

    tensors = {"b": torch.randn(3).bfloat16(), "e": torch.randn(3).to(torch.float8_e4m3fn)}
    save_tensors(tensors, tmp_path / "x.safetensors")
    found = {array.name: array for array in arrays_in_file(tmp_path / "x.safetensors")}
    for name, tensor in tensors.items():
        assert found[name].dtype == str(tensor.dtype).removeprefix("torch.")
        assert found[name].read().tobytes() == tensor.view(torch.uint8).numpy().tobytes()


def test_a_folder_is_read_by_its_index_or_whole(tmp_path):
    parts = dict(ARRAYS)
    save_file({"w": parts.pop("w")}, tmp_path / "b.safetensors")
    save_file(parts, tmp_path / "a.safetensors")
    assert equal(arrays_in_folder(tmp_path), ARRAYS)
    index = tmp_path / "model.safetensors.index.json"
    where = {name: "b.safetensors" if name == "w" else "a.safetensors" for name in ARRAYS}
    index.write_text(json.dumps({"weight_map": where}))
    assert [array.name for array in arrays_in_folder(tmp_path)] == list(ARRAYS)
    (tmp_path / "c.safetensors").write_bytes(b"no matter")
    assert equal(arrays_in_folder(tmp_path), ARRAYS)
    index.write_text(json.dumps({"weight_map": {**where, "more": "a.safetensors"}}))
    with pytest.raises(CheckpointError, match="more is named by the index and in no file"):
        arrays_in_folder(tmp_path)
    del where["u"]
    index.write_text(json.dumps({"weight_map": where}))
    with pytest.raises(CheckpointError, match="u is in a file and not named by the index"):
        arrays_in_folder(tmp_path)
    index.unlink()
    save_file(ARRAYS, tmp_path / "c.safetensors")
    with pytest.raises(CheckpointError, match="is in two files"):
        arrays_in_folder(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        '{"weight_map": {"a": "../x"}}',
        '{"weight_map": {"a": ".."}}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": "absent.safetensors"}}',
        '{"weight_map": 3}',
        '{"weight_map": {}}',
        "{}",
        "[]",
        "[",
        "[" * 99999,
        "\x00",
    ],
)
def test_an_index_that_is_none_is_named(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index|absent\.safetensors"):
        arrays_in_folder(tmp_path)


def written(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype="F32", shape=(2,), at=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(at)}


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"w": entry(shape=(3,))}, "would lie from byte"),
        ({"w": entry(at=(0, 2**62), shape=(2**60,))}, "would lie from byte|more elements"),
        ({"w": entry(at=(4, 12))}, "would lie from byte"),
        ({"w": entry(at=(-8, 0))}, "would lie from byte"),
        ({"w": entry(), "v": entry()}, "would lie from byte"),
        ({"w": entry(at=(8, 0), shape=(-2,))}, "the length -2"),
        ({"w": entry(shape=(1,), at=(0, 4))}, "belong to no array"),
        ({"w": entry(dtype="F4")}, "of dtype F4"),
        ({"w": entry(dtype=["F32"])}, "of dtype"),
        ({"w": {"dtype": "F32"}}, "does not say where"),
        ({"w": 3}, "does not say where"),
        ({"w": entry(at=(True, 8))}, "does not say where"),
        ([], "no mapping"),
        (b'{"w": {}, "w": {}}', "stands there twice"),
        (b"{" * 100_000, "cannot be read"),
        (b'{"w": ' * 50_000, "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, ' + b"9" * 5000 + b"]}}", "cannot be read"),
    ],
)
def test_a_header_that_does_not_fit_its_file_is_refused(tmp_path, header, said):
    with pytest.raises(CheckpointError, match=said):
        arrays_in_file(written(tmp_path / "x.safetensors", header, bytes(8)))


@pytest.mark.parametrize("data", [b"", b"1234567", struct.pack("<Q", 2**63), struct.pack("<Q", 9) + b"{}"])
def test_what_is_no_file_of_this_kind_is_refused_before_any_memory_is_taken(tmp_path, data):
    (tmp_path / "x.safetensors").write_bytes(data)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=r"no whole safetensors file|no safetensors file"):
        arrays_in_file(tmp_path / "x.safetensors")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


def test_damage_is_a_sentence_or_the_very_arrays_that_the_library_reads(tmp_path):
    chance = random.Random(0)
    whole, place = save(ARRAYS), tmp_path / "x.safetensors"
    refused = 0
    for _ in range(400):
        data = bytearray(whole)
        at = chance.randrange(len(data) if chance.random() < 0.3 else 400)
        match chance.randrange(4):
            case 0:
                data[at] ^= 1 << chance.randrange(8)
            case 1:
                del data[at:]
            case 2:
                data[at : at + 8] = b"\xff" * 8
            case _:
                data[at:at] = b"9" * chance.randrange(1, 9)
        place.write_bytes(data)
        try:
            found = arrays_in_file(place)
            numbers = {array.name: array.read().tobytes() for array in found}
        except CheckpointError:
            refused += 1
            continue
        with safe_open(place, framework="numpy") as opened:  # what we take, the library takes, alike
            assert numbers == {name: opened.get_tensor(name).tobytes() for name in opened.keys()}  # noqa: SIM118
    assert refused > 200


def test_a_file_cut_short_meanwhile_is_named(tmp_path):
    place = tmp_path / "x.safetensors"
    save_file(ARRAYS, place)
    found = arrays_in_file(place)
    place.write_bytes(place.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match="was cut short meanwhile"):
        for array in found:
            array.read()
