"""DeepSpeed goes on from what we wrote, and we from what it saved, with the optimizer's memory, losses equal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from models import MODELS  # noqa: E402
from rank_pool import RankPools  # noqa: E402

from trainfleet.checkpoint import Checkpointer  # noqa: E402
from trainfleet.checkpoint.catalog import read_step  # noqa: E402
from trainfleet.checkpoint.foreign import open_foreign  # noqa: E402
from trainfleet.checkpoint.foreign.deepspeed import is_universal, open_universal, write_universal  # noqa: E402
from trainfleet.checkpoint.foreign.into_store import import_states  # noqa: E402
from trainfleet.checkpoint.whole import Whole  # noqa: E402
from trainfleet.deps import installed  # noqa: E402
from trainfleet.errors import CheckpointError  # noqa: E402
from trainfleet.mesh import Mesh  # noqa: E402
from trainfleet.parallel import make_engine, parallelize  # noqa: E402
from trainfleet.plan import Plan  # noqa: E402
from trainfleet.store import FileStore  # noqa: E402

needs_deepspeed = pytest.mark.skipif(installed("deepspeed") is None, reason="DeepSpeed is not installed")

CASE = MODELS["transformer"]


class Run:
    """A model in training; a step takes four micro-batches on any number of ranks."""

    def __init__(self, plan: Plan, mesh: Mesh, folder: Path) -> None:
        torch.manual_seed(0)
        self.group = mesh.data_axes
        model = parallelize(CASE.build(0), mesh, plan, example=CASE.micro_batch(0, 0))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3, betas=(0.8, 0.9))
        self.engine = make_engine(model, optimizer, CASE.loss_fn)
        self.checkpointer = Checkpointer(FileStore(folder / "ours"), group=mesh.world)

    def states(self) -> dict[str, Any]:
        return {name: state for name, state in self.engine.state().items() if name != "engine"}

    def step(self, number: int) -> float:
        own = range(4 * number + self.group.rank, 4 * number + 4, self.group.size)
        loss = self.engine.forward_backward([CASE.micro_batch(0, i) for i in own])
        self.engine.clip(0.5)
        assert self.engine.step()
        return loss.mean


def saved_by_us(plan: Plan, folder: Path) -> list[float]:
    """Two steps, a checkpoint, and the losses of two more."""
    with Mesh.from_env(plan) as mesh:
        run = Run(plan, mesh, folder)
        run.step(0), run.step(1)
        run.checkpointer.save(2, **run.states()).wait()
        run.checkpointer.close()
        return [run.step(2), run.step(3)]


def gone_on_in_deepspeed(zero: int, folder: Path) -> list[float]:
    (folder / "ds.json").write_text('{"checkpoint": {"load_universal": true}}')
    plan = Plan(engine="deepspeed", engine_required=True, zero=zero, deepspeed_config=str(folder / "ds.json"))
    with Mesh.from_env(plan) as mesh:
        run = Run(plan, mesh, folder)
        path, _ = run.engine._deepspeed.load_checkpoint(str(folder / "theirs"), load_lr_scheduler_states=False)
        assert path is not None
        assert run.engine._deepspeed.global_steps == 2
        return [run.step(2), run.step(3)]


SPLIT = [
    (4, Plan(tp=2, zero=2)),
    pytest.param((8, Plan(tp=2, pp=2, zero=2, microbatches=2)), marks=pytest.mark.matrix),
]


@needs_deepspeed
@pytest.mark.parametrize("saved", SPLIT, ids=["layers", "layers and stages"])
def test_deepspeed_goes_on_from_a_checkpoint_of_split_layers(
    ranks: RankPools, tmp_path: Path, saved: tuple[int, Plan]
) -> None:
    size, plan = saved
    expected = ranks(size, saved_by_us, plan, tmp_path)[0]
    _, indexes = read_step(FileStore(tmp_path / "ours"), 2)
    with Whole(FileStore(tmp_path / "ours"), indexes) as whole:
        made = write_universal(whole, tmp_path / "theirs", 2)
    assert made.name == "global_step2" and is_universal(tmp_path / "theirs") and is_universal(made)
    for zero in (2, 3):
        for found in ranks(2, gone_on_in_deepspeed, zero, tmp_path):
            assert found == pytest.approx(expected, rel=2e-5)


def saved_by_deepspeed(zero: int, folder: Path) -> list[float]:
    plan = Plan(engine="deepspeed", engine_required=True, zero=zero)
    with Mesh.from_env(plan) as mesh:
        run = Run(plan, mesh, folder)
        run.step(0), run.step(1)
        run.engine._deepspeed.save_checkpoint(str(folder / "theirs"), tag="two")
        return [run.step(2), run.step(3)]


def gone_on_with_us(plan: Plan, folder: Path) -> list[float]:
    with Mesh.from_env(plan) as mesh:
        run = Run(plan, mesh, folder)
        assert run.checkpointer.restore(**run.states()) == 2
        return [run.step(2), run.step(3)]


def consolidated(folder: Path) -> dict[str, Any]:
    """What DeepSpeed's zero_to_fp32 makes of its checkpoint, as we read it."""
    call = "from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict as convert\n"
    call += f"convert({str(folder / 'theirs')!r}, {str(folder / 'whole')!r}, tag='two', safe_serialization=True)"
    done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return {array.name: array for array in open_foreign(folder / "whole").arrays}


@needs_deepspeed
@pytest.mark.matrix
@pytest.mark.parametrize("zero", [2, 3])
def test_we_go_on_from_what_deepspeed_saved(ranks: RankPools, tmp_path: Path, zero: int) -> None:
    expected = ranks(2, saved_by_deepspeed, zero, tmp_path)[0]
    source, universal = tmp_path / "theirs" / "two", tmp_path / "theirs" / "two_universal"
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--num_extract_workers=1"]
    command += ["--num_merge_workers=1", "--inject_missing_state"]
    command += [f"--input_folder={source}", f"--output_folder={universal}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    states = open_universal(tmp_path / "theirs")
    assert states["optimizer"]["groups"][0]["betas"] == [0.8, 0.9]
    weights = consolidated(tmp_path)
    assert set(weights) == set(states["model"])
    assert all((weights[name].read() == array.read()).all() for name, array in states["model"].items())
    import_states(FileStore(tmp_path / "ours"), states, step=2)
    for plan in (Plan(zero=1), Plan(tp=2)):
        for found in ranks(2, gone_on_with_us, plan, tmp_path):
            assert found == pytest.approx(expected, rel=2e-5)


# ── what is no such checkpoint ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def universal(tmp_path: Path) -> Path:
    """A small universal checkpoint, as DeepSpeed lays it out."""
    folder = tmp_path / "global_step1" / "zero"
    for name in ("a.weight", "b.bias"):
        (folder / name).mkdir(parents=True)
        for key in ("fp32", "exp_avg", "exp_avg_sq"):
            torch.save({"param": torch.arange(3.0)}, folder / name / f"{key}.pt")
        torch.save(torch.tensor(1), folder / name / "step.pt")
    groups = [{"lr": 0.1, "betas": (0.9, 0.99), "params": [0]}]
    torch.save({"param_groups": groups, "partition": torch.ones(2)}, folder / "optimizer_state.pt")
    (tmp_path / "latest_universal").write_text("global_step1")
    return tmp_path


def test_a_universal_checkpoint_is_read_without_deepspeed(universal: Path) -> None:
    states = open_universal(universal)
    assert list(states["model"]) == ["a.weight", "b.bias"]
    memory = states["optimizer"]["memory"]["a.weight"]
    assert set(memory) == {"exp_avg", "exp_avg_sq", "step"}
    assert (memory["step"].dtype, memory["step"].shape) == ("float32", ())
    assert states["optimizer"]["groups"] == [{"lr": 0.1, "betas": [0.9, 0.99]}]
    assert memory["exp_avg"].read().view("float32").tolist() == [0.0, 1.0, 2.0]


class Explosive:
    def __reduce__(self) -> Any:
        return (Path("/tmp/trainfleet-exploded").touch, ())


@pytest.mark.parametrize("name", ["optimizer_state.pt", "a.weight/fp32.pt", "b.bias/step.pt"])
def test_nothing_in_its_pickles_is_run(universal: Path, name: str) -> None:
    torch.save({"param_groups": [], "param": Explosive()}, universal / "global_step1/zero" / name)
    with pytest.raises(CheckpointError, match=r"does not belong there|could run as a program"):
        open_universal(universal)
    assert not Path("/tmp/trainfleet-exploded").exists()


def test_what_is_damaged_is_named(universal: Path) -> None:
    (universal / "latest_universal").write_text("../elsewhere")
    with pytest.raises(CheckpointError, match="no universal checkpoint beside it"):
        open_universal(universal)
    (universal / "latest_universal").write_text("global_step1")
    (universal / "global_step1/zero/optimizer_state.pt").write_bytes(b"no zip")
    with pytest.raises(CheckpointError, match="none of DeepSpeed's: BadZipFile"):
        open_universal(universal)


def test_a_checkpoint_of_weights_alone_is_not_written_for_deepspeed(tmp_path: Path) -> None:
    class Weights:
        def state_dict(self) -> dict[str, Any]:
            return {"w": torch.ones(2)}

        def load_state_dict(self, state: Any) -> None: ...

    store = FileStore(tmp_path / "ours")
    with Checkpointer(store) as checkpointer:
        checkpointer.save(1, model=Weights()).wait()
    with Whole(store, read_step(store, 1)[1]) as whole, pytest.raises(CheckpointError, match="no state 'optimizer'"):
        write_universal(whole, tmp_path / "theirs", 1)
    assert not is_universal(tmp_path / "theirs")
