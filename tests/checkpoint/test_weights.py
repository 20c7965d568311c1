"""Weights come from runs, checkpoints and foreign files alike, at any cut, or nothing is touched."""

from __future__ import annotations

import numpy as np
import pytest
from held import Held
from safetensors.numpy import save_file

from trainfleet.checkpoint import Checkpointer, Retention
from trainfleet.checkpoint.weights import load_weights
from trainfleet.comm.threads import run_ranks
from trainfleet.errors import CheckpointError
from trainfleet.state import ShardedArray
from trainfleet.store import FileStore

WHOLE = np.arange(12, dtype="f4").reshape(4, 3)


def fresh(group, dtype="f4"):
    rows = np.array_split(np.arange(4), group.size)[group.rank]
    local = np.zeros((len(rows), 3), dtype)
    piece = ShardedArray(name="w", global_shape=(4, 3), offsets=(int(rows[0]), 0), local=local)
    return rows, Held(**{"layer.w": piece, "n": np.array(0)})


@pytest.fixture
def places(tmp_path):
    """The same weights at several places, steps 1 and 2 of a run among them; step 1 holds twice the numbers."""
    with Checkpointer(FileStore(tmp_path / "run" / "checkpoints"), retention=Retention(last=2)) as checkpointer:
        for step in (1, 2):
            weights = Held(**{"layer.w": WHOLE * np.float32(3 - step), "n": np.array(7)})
            checkpointer.save(step, model=weights, optimizer=Held(x=1)).wait()
    (tmp_path / "hf").mkdir()
    weights = {"module.layer.w": WHOLE, "module.n": np.array(7)}
    save_file(weights, tmp_path / "hf" / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    "place", ["run", "run/checkpoints", "run/checkpoints/step-00000002", "hf", "hf/model.safetensors"]
)
def test_every_place_gives_the_same_weights_at_any_number_of_ranks(places, place):
    def load(group):
        rows, model = fresh(group)
        load_weights(str(places / place), model, group=group)
        assert (model.value["layer.w"].local == WHOLE[rows]).all() and model.value["n"] == 7

    for size in (1, 3):
        run_ranks(size, load)


def test_a_step_that_is_named_is_taken(places):
    def load(group):
        _, model = fresh(group)
        load_weights(str(places / "run/checkpoints/step-00000001"), model, group=group)
        assert (model.value["layer.w"].local == 2 * WHOLE).all()

    run_ranks(1, load)


def test_files_of_torch_are_taken_too(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    model = torch.nn.Linear(3, 2)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "x.pt")
    live = Held(**{name: np.zeros(tuple(t.shape), "f4") for name, t in model.state_dict().items()})
    load_weights(str(tmp_path / "x.pt"), live)
    assert all((live.value[name] == t.numpy()).all() for name, t in model.state_dict().items())


def test_what_does_not_fit_is_named_on_all_ranks_and_nothing_is_touched(places):
    def load(group):
        _, model = fresh(group)
        del model.value["n"]
        if group.rank == 1:
            model.value["layer.w"] = ShardedArray(
                name="w", global_shape=(4, 2), offsets=(0, 0), local=np.zeros((4, 2), "f4")
            )
        with pytest.raises(CheckpointError) as error:
            load_weights(str(places / "hf"), model, group=group)
        assert not model.value["layer.w"].local.any()
        return str(error.value)

    said = run_ranks(2, load)
    assert (
        "model/n is in the checkpoint and not here" in said[0] and "(4, 3) in the checkpoint and (4, 2) here" in said[1]
    )


def test_another_float_is_rounded_only_when_allowed(places):
    def load(group):
        _, model = fresh(group, "f2")
        with pytest.raises(CheckpointError, match=r"dtype float32 in the checkpoint and float16 here; .*cast=True"):
            load_weights(str(places / "hf"), model, group=group)
        load_weights(str(places / "hf"), model, group=group, cast=True)
        assert (model.value["layer.w"].local == WHOLE.astype("f2")).all()

    run_ranks(1, load)


def test_a_place_without_weights_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        load_weights(str(tmp_path / "nowhere"), Held())
    with pytest.raises(CheckpointError, match="There are no checkpoints in"):
        load_weights(str(tmp_path), Held())
    with pytest.raises(CheckpointError, match="There is no checkpoint in memory"):
        load_weights("memory://", Held())
