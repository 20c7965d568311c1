"""A torch module trains among NumPy layers as it trains in torch."""

from __future__ import annotations

import numpy as np
import pytest

from trainfleet.mpi.cross_entropy import cross_entropy
from trainfleet.mpi.layers import Linear, Sequential
from trainfleet.mpi.mesh import Mesh
from trainfleet.mpi.optimizers import AdamW
from trainfleet.mpi.trainer import Trainer
from trainfleet.plan import Plan

torch = pytest.importorskip("torch", reason="the adapter is for torch")

X = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
TARGETS = np.random.default_rng(1).integers(0, 4, 8)


def module():
    """Ranks may be threads, which share torch's generator: weights are drawn from another."""
    made = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.LayerNorm(5), torch.nn.Tanh())
    draw = np.random.default_rng(2)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.tensor(draw.normal(size=tuple(parameter.shape)) * 0.4))
    return made


def losses(group, plan):
    from trainfleet.mpi.torch_model import TorchLayer

    mesh = Mesh(group, plan)
    data = mesh.data_axes
    model = Sequential([TorchLayer(module()), Linear.random(5, 4, np.random.default_rng(0))])
    batch = (X[data.rank :: data.size], TARGETS[data.rank :: data.size])
    return Trainer(model, AdamW(learning_rate=0.05), cross_entropy, [batch] * 4, mesh=mesh).fit(4)


def in_torch():
    model = torch.nn.Sequential(module(), torch.nn.Linear(5, 4))
    numpy = Linear.random(5, 4, np.random.default_rng(0))
    model[1].load_state_dict({name: torch.tensor(value) for name, value in numpy.parameters.items()})
    optimizer, found = torch.optim.AdamW(model.parameters(), lr=0.05), []
    for _ in range(4):
        loss = torch.nn.functional.cross_entropy(model(torch.tensor(X)), torch.tensor(TARGETS))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("plan", [Plan(), Plan(zero=1), Plan(zero=2), Plan(zero=3), Plan(pp=2)], ids=str)
def test_it_has_the_losses_of_torch(run, plan):
    for found in run(2, losses, plan):
        np.testing.assert_allclose(found, in_torch(), rtol=2e-4)


def test_its_parameters_share_memory_and_are_set_in_place():
    from trainfleet.mpi.torch_model import TorchLayer

    inner = module()
    layer = TorchLayer(inner)
    layer.parameters["0.bias"][0] = 3
    assert inner[0].bias[0] == 3
    layer.parameters["0.bias"] = np.full(5, 4, np.float32)
    assert inner[0].bias.tolist() == [4.0] * 5
    assert len(layer.parameters) == len(list(layer.parameters)) == 4
    with pytest.raises(TypeError):
        del layer.parameters["0.bias"]
