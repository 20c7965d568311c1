"""Weights of others come in by name and value; what could run as a program does not run."""

from __future__ import annotations

import contextlib
import os
import pickle
import random
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="foreign weights are tensors")
from safetensors.torch import save_file  # noqa: E402
from torch import nn  # noqa: E402

from trainfleet.checkpoint.foreign import read_foreign, renamed  # noqa: E402
from trainfleet.errors import CheckpointError  # noqa: E402


def weights():
    draw = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(5, 3, generator=draw),
        "b": torch.randn(4, generator=draw).bfloat16(),
        "n": torch.tensor(7),
    }


def equal(found, expected):
    return found.keys() == expected.keys() and all(
        found[n].dtype == expected[n].dtype and torch.equal(found[n], expected[n]) for n in expected
    )


def write(kind: str, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    if kind == "safetensors":
        save_file(weights(), folder / "x.safetensors")
        return folder / "x.safetensors"
    if kind == "folder":
        parts = weights()
        save_file({"b": parts.pop("b")}, folder / "2.safetensors")
        save_file(parts, folder / "1.safetensors")
        return folder
    if kind == "dcp":
        import torch.distributed.checkpoint as dcp

        dcp.save({**weights(), "lr": 0.1}, checkpoint_id=folder / "dcp", no_dist=True)
        return folder / "dcp"
    torch.save(weights() if kind == "pt" else {"model": weights(), "epoch": 3}, folder / "x.pt")
    return folder / "x.pt"


KINDS = ["safetensors", "folder", "pt", "pt among others", "dcp"]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_read_by_name_and_value(kind, tmp_path):
    assert equal(read_foreign(write(kind, tmp_path / "x")), weights())


def test_an_index_names_files_beside_it_only(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    save_file(weights(), tmp_path / "other.safetensors")
    index.write_text('{"weight_map": {"a": "other.safetensors"}}')
    assert equal(read_foreign(tmp_path), weights())
    for text in ('{"weight_map": {"a": "../x"}}', '{"weight_map": {"a": 3}}', "{}", "[", '{"weight_map": 3}'):
        index.write_text(text)
        with pytest.raises(CheckpointError, match="index"):
            read_foreign(tmp_path)


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("kind", ["pt", "dcp"])
def test_what_would_run_does_not(kind, tmp_path):
    mark = tmp_path / "ran"
    if kind == "pt":
        place = tmp_path / "x.pt"
        torch.save({"w": Evil(mark)}, place)
    else:
        place = tmp_path / "dcp"
        place.mkdir()
        (place / ".metadata").write_bytes(pickle.dumps(Evil(mark)))
    with pytest.raises(CheckpointError, match=r"could run as a program|posix\.mkdir, which does not belong there"):
        read_foreign(place)
    assert not mark.exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_an_error_in_words_and_nothing_else(kind, tmp_path):
    chance = random.Random(kind)
    place = write(kind, tmp_path / "x")
    files = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())
    whole = {file: file.read_bytes() for file in files}
    for _ in range(40):
        file = chance.choice(files)
        data = bytearray(whole[file])
        match chance.randrange(3):
            case 0:
                data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            case 1:
                del data[chance.randrange(len(data)) :]
            case _:
                at = chance.randrange(len(data))
                data[at : at + 8] = b"\xff" * 8
        file.write_bytes(data)
        with contextlib.suppress(CheckpointError):  # without digests of their own, wrong numbers may pass
            read_foreign(place)
        file.write_bytes(whole[file])


def test_nothing_and_strangers_are_named(tmp_path):
    for place, said in ((tmp_path / "no", "no file or folder"), (tmp_path, "neither safetensors files nor")):
        with pytest.raises(CheckpointError, match=said):
            read_foreign(place)
    (tmp_path / "x.h5").touch()
    with pytest.raises(CheckpointError, match="no known kind"):
        read_foreign(tmp_path / "x.h5")
    torch.save([1, 2], tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="no mapping of names to tensors"):
        read_foreign(tmp_path / "x.pt")


def test_names_of_wrappers_are_taken_off():
    model = nn.Linear(2, 2)
    plain = dict(model.state_dict())
    wrapped = {f"module._orig_mod.{name}": value for name, value in plain.items()}
    found, prefix = renamed(wrapped, None)
    assert equal(found, plain) and prefix == "module._orig_mod."
    assert renamed({**plain, "module.x": 1}, None) == ({**plain, "module.x": 1}, "")
    assert renamed({"net.a": 1, "net.b": 2}, "net.") == ({"a": 1, "b": 2}, "net.")
    with pytest.raises(CheckpointError, match=r"b does not begin with 'net\.'"):
        renamed({"net.a": 1, "b": 2}, "net.")
