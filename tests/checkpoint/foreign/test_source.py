"""What a person names is opened for what it is, and its arrays are called as in the plain module."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save_file

from trainfleet.checkpoint import Checkpointer
from trainfleet.checkpoint.foreign.source import is_foreign, open_foreign, renamed
from trainfleet.errors import CheckpointError
from trainfleet.store import FileStore

ARRAYS = {"a.w": np.arange(3.0), "b": np.zeros(2, "i4")}


def names(found):
    return [array.name for array in found.arrays]


def test_every_kind_is_known_by_what_it_is(tmp_path):
    save_file(ARRAYS, tmp_path / "x.safetensors")
    for place in (tmp_path / "x.safetensors", tmp_path):
        assert names(open_foreign(place)) == ["a.w", "b"] and is_foreign(place)
        assert open_foreign(place).num_bytes == 32


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_torch_saves_is_known_too(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    import torch.distributed.checkpoint as torch_dcp

    model = {"w": torch.zeros(2)}
    torch.save({"model": {**model, "again": model["w"]}, "epoch": 1}, tmp_path / "x.pt")
    found = open_foreign(tmp_path / "x.pt")
    assert names(found) == ["w"] and found.remarks == [
        "the tensors under 'model'",
        "left out, as no tensors among them: epoch",
        "again is w under another name, and stored once",
    ]
    torch_dcp.save({"model": model}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert names(open_foreign(tmp_path / "dcp")) == ["w"] and is_foreign(tmp_path / "dcp")


def test_nothing_and_strangers_are_named(tmp_path):
    for place, said in ((tmp_path / "no", "no file or folder"), (tmp_path, "neither safetensors files nor")):
        with pytest.raises(CheckpointError, match=said):
            open_foreign(place)
        assert not is_foreign(place)
    (tmp_path / "x.h5").touch()
    with pytest.raises(CheckpointError, match="of no known kind"):
        open_foreign(tmp_path / "x.h5")
    save_file({}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="holds no arrays"):
        open_foreign(tmp_path / "x.safetensors")


def test_a_checkpoint_of_our_own_is_not_taken_for_a_stranger(tmp_path):
    class Held:
        def state_dict(self):
            return ARRAYS

        def load_state_dict(self, state): ...

    with Checkpointer(FileStore(tmp_path)) as checkpointer:
        checkpointer.save(1, model=Held())
    place = tmp_path / "step-00000001"
    assert not is_foreign(place)
    with pytest.raises(CheckpointError, match="is a checkpoint of trainfleet already"):
        open_foreign(place)


@pytest.mark.parametrize(
    ("old", "strip", "new", "taken"),
    [
        (["a.w", "b"], None, ["a.w", "b"], None),
        (["module.a", "module.b"], None, ["a", "b"], "'module.'"),
        (["module.a", "b"], None, ["module.a", "b"], None),
        (["_orig_mod.a"], None, ["a"], "'_orig_mod'"),
        (["_orig_mod.module.a", "_orig_mod.module.b"], None, ["a", "b"], "'module.', '_orig_mod'"),
        (["h.0._orig_mod.w", "h.1._checkpoint_wrapped_module.w"], None, ["h.0.w", "h.1.w"], "_checkpoint_wrapped"),
        (["module.a", "module.b"], "", ["module.a", "module.b"], None),
        (["net.a", "net.b"], "net.", ["a", "b"], "'net.'"),
    ],
)
def test_what_wrappers_put_into_names_is_taken_off_and_told(old, strip, new, taken):
    found, remark = renamed(old, strip)
    assert found == new and (remark is None if taken is None else taken in remark)


@pytest.mark.parametrize(
    ("old", "strip", "said"),
    [
        (["net.a", "b"], "net.", r"b does not begin with 'net\.'"),
        (["a._orig_mod.w", "a.w"], None, "Two arrays would both be called a.w"),
        (["net."], "net.", "nothing would be left of a name"),
    ],
)
def test_names_that_would_be_lost_are_refused(old, strip, said):
    with pytest.raises(CheckpointError, match=said):
        renamed(old, strip)


def test_only_some_can_be_taken(tmp_path):
    save_file({"model.w": np.zeros(1), "optimizer.w": np.zeros(1)}, tmp_path / "x.safetensors")
    assert names(open_foreign(tmp_path / "x.safetensors", only="model.", strip="model.")) == ["w"]
    with pytest.raises(CheckpointError, match=r"no arrays whose names begin with 'net\.'; there is model\.w"):
        open_foreign(tmp_path / "x.safetensors", only="net.")
