"""Files of torch.save give their tensors; what could run, or would fill memory, does neither."""

from __future__ import annotations

import contextlib
import io
import os
import random
import zipfile
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="files of torch.save need torch")
from torch import nn  # noqa: E402

from trainfleet.checkpoint.foreign.torch_file import arrays_in_torch_file  # noqa: E402
from trainfleet.errors import CheckpointError  # noqa: E402


def weights():
    draw = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(5, 3, generator=draw).T,  # not contiguous
        "b": torch.randn(4, generator=draw).bfloat16(),
        "n": torch.tensor(7),
        "none": torch.zeros(0, 3),
    }


def equal(found, expected):
    return {array.name: (array.dtype, array.shape, array.read().tobytes()) for array in found} == {
        name: (str(t.dtype)[6:], tuple(t.shape), t.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        for name, t in expected.items()
    }


@pytest.mark.parametrize("new", [True, False], ids=["zip", "older"])
def test_every_tensor_comes_by_name_and_value(tmp_path, new):
    torch.save(weights(), tmp_path / "x.pt", _use_new_zipfile_serialization=new)
    found = arrays_in_torch_file(tmp_path / "x.pt")
    assert equal(found.arrays, weights()) and found.within is None and found.others == []


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict", "module"])
def test_weights_are_found_among_other_things(tmp_path, key):
    torch.save({"epoch": 3, key: weights(), "best": torch.ones(1)}, tmp_path / "x.pt")
    found = arrays_in_torch_file(tmp_path / "x.pt")
    assert equal(found.arrays, weights()) and (found.within, found.others) == (key, ["epoch", "best"])


def test_a_tied_weight_comes_once_and_a_note_beside_weights_is_told(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    torch.save({**model.state_dict(), "_extra_state": {"note": 1}}, tmp_path / "x.pt")
    found = arrays_in_torch_file(tmp_path / "x.pt")
    assert [array.name for array in found.arrays] == ["0.weight", "0.bias", "1.bias"]
    assert found.tied == {"1.weight": "0.weight"} and found.others == ["_extra_state"]


def test_parts_of_one_storage_are_different_arrays(tmp_path):
    base = torch.arange(6.0)
    torch.save({"first": base[:3], "last": base[3:], "all": base}, tmp_path / "x.pt")
    found = arrays_in_torch_file(tmp_path / "x.pt")
    assert equal(found.arrays, {"first": base[:3], "last": base[3:], "all": base}) and not found.tied


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("new", [True, False], ids=["zip", "older"])
def test_what_would_run_does_not(tmp_path, new):
    torch.save({"w": Evil(tmp_path / "ran")}, tmp_path / "x.pt", _use_new_zipfile_serialization=new)
    with pytest.raises(CheckpointError, match="could run as a program") as error:
        arrays_in_torch_file(tmp_path / "x.pt")
    assert not (tmp_path / "ran").exists() and "state_dict" in str(error.value.hint)
    torch.save(nn.Linear(2, 2), tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="could run as a program"):
        arrays_in_torch_file(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("saved", "said"),
    [
        ([1, 2], "holds no mapping of names to tensors"),
        ({"lr": 0.1}, "holds no mapping of names to tensors"),
        ({"w": torch.zeros(2, device="meta")}, "holds no mapping of names to tensors"),
        ({"w": torch.zeros(1).expand(1 << 40)}, "would take 4398046511104 bytes"),
    ],
)
def test_what_is_no_weights_is_refused(tmp_path, saved, said):
    torch.save(saved, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=said):
        arrays_in_torch_file(tmp_path / "x.pt")


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path):
    made = io.BytesIO()
    torch.save({"w": torch.zeros(1 << 22)}, made)
    for packed in (True, False):
        with zipfile.ZipFile(made) as source, zipfile.ZipFile(tmp_path / "x.pt", "w") as bomb:
            for member in source.infolist():
                how = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
                bomb.writestr(member.filename, source.read(member), compress_type=how)
        if packed:
            assert (tmp_path / "x.pt").stat().st_size < 100_000
            with pytest.raises(CheckpointError, match="is compressed inside"):
                arrays_in_torch_file(tmp_path / "x.pt")
        else:
            data = (tmp_path / "x.pt").read_bytes()
            (tmp_path / "x.pt").write_bytes(data[: len(data) // 2])
            with pytest.raises(CheckpointError, match="cannot be read as a file of"):
                arrays_in_torch_file(tmp_path / "x.pt")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("new", [True, False], ids=["zip", "older"])
def test_damage_is_an_error_in_words_and_nothing_else(tmp_path, new):
    chance = random.Random(new)
    place = tmp_path / "x.pt"
    torch.save(weights(), place, _use_new_zipfile_serialization=new)
    whole = place.read_bytes()
    refused = 0
    for _ in range(150):
        data = bytearray(whole)
        at = chance.randrange(len(data))
        match chance.randrange(3):
            case 0:
                data[at] ^= 1 << chance.randrange(8)
            case 1:
                del data[at:]
            case _:
                data[at : at + 8] = b"\xff" * 8
        place.write_bytes(data)
        refused += 1
        with contextlib.suppress(CheckpointError):  # without digests of their own, wrong numbers may pass
            for array in arrays_in_torch_file(place).arrays:
                array.read()
            refused -= 1
    assert refused > 40
