"""A checkpoint of any plan goes on under any other, through the Checkpointer that the user brings."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from trainfleet.checkpoint import Checkpointer
from trainfleet.comm.threads import run_ranks
from trainfleet.mpi.cross_entropy import cross_entropy
from trainfleet.mpi.layers import mlp
from trainfleet.mpi.mesh import Mesh
from trainfleet.mpi.optimizers import AdamW
from trainfleet.mpi.trainer import Trainer
from trainfleet.plan import Plan
from trainfleet.store import FileStore


def batches(rank, size, skip):
    draw = np.random.default_rng(0)
    for step in range(100):
        x, targets = draw.normal(size=(8, 6)), draw.integers(0, 4, 8)
        if step >= skip:
            yield x[rank::size], targets[rank::size]


def trained(group, plan, folder, steps):
    """Up to `steps`, from the newest checkpoint if there is one; saves at the end."""
    mesh = Mesh(group, plan)
    store = FileStore(folder)
    with Checkpointer(store, group=group) as checkpointer:
        trainer = Trainer(mlp([6, 8, 8, 4], dtype=np.float64), AdamW(learning_rate=0.05), cross_entropy, [], mesh=mesh)
        trainer.step = checkpointer.restore(**trainer.state()) or 0
        trainer._batches = batches(mesh.data_axes.rank, mesh.data_axes.size, trainer.step)
        losses = trainer.fit(steps)
        checkpointer.save(steps, **trainer.state()).wait()
    return losses


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ((2, Plan(zero=3)), (2, Plan(tp=2))),
        ((2, Plan(tp=2)), (2, Plan(zero=1))),
        ((2, Plan(pp=2)), (2, Plan(zero=2))),
        ((2, Plan(zero=1)), (2, Plan(pp=2))),
        ((4, Plan(zero=3, tp=2)), (2, Plan())),
        ((4, Plan(tp=2, pp=2)), (4, Plan(zero=3, dp_replicate=2))),
    ],
    ids=lambda case: f"{case[0]} ranks {case[1]}",
)
def test_a_run_goes_on_under_another_plan(run, tmp_path, first, then):
    folder = str(tmp_path) if "PMI_RANK" not in os.environ else shared_folder(run)
    (expected,) = run_ranks(1, lambda group: trained(group, Plan(), f"{folder}/whole", 6))
    run(first[0], trained, first[1], f"{folder}/cut", 3)
    for found in run(then[0], trained, then[1], f"{folder}/cut", 6):
        np.testing.assert_allclose(found, expected[3:], rtol=1e-9)


def made_folder(group):
    return group.exchange(tempfile.mkdtemp(prefix="trainfleet-mpi-") if group.rank == 0 else None)[0]


def shared_folder(run):
    """Under mpiexec every rank has a tmp_path of its own, and must use that of rank 0."""
    return run(2, made_folder)[0]


def test_what_numpy_saves_torch_loads(tmp_path):
    torch = pytest.importorskip("torch", reason="the other side is torch")
    run_ranks(2, lambda group: trained(group, Plan(zero=3), tmp_path, 2))
    model = torch.nn.Sequential(*(torch.nn.Linear(6, 8), torch.nn.GELU(), torch.nn.Linear(8, 8), torch.nn.GELU()))
    model.append(torch.nn.Linear(8, 4))
    model.double()
    state = type("Model", (), {"state_dict": model.state_dict, "load_state_dict": model.load_state_dict})()
    store = FileStore(tmp_path)
    reader = Checkpointer(store)
    reader.restore(partial=True, model=state)
    (whole,) = run_ranks(1, lambda group: parameters_after(group, tmp_path))
    for name, parameter in model.named_parameters():
        np.testing.assert_array_equal(parameter.detach().numpy(), whole[name])


def parameters_after(group, folder):
    mesh = Mesh(group)
    trainer = Trainer(mlp([6, 8, 8, 4], dtype=np.float64), AdamW(), cross_entropy, [], mesh=mesh)
    Checkpointer(FileStore(folder)).restore(**trainer.state())
    return dict(trainer.spread.model.parameters)


def test_saving_needs_no_torch(tmp_path):
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_state import Plan, run_ranks, trained
run_ranks(1, lambda group: trained(group, Plan(), {str(tmp_path)!r}, 2))
sys.exit("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
