"""Every stage takes the steps that one process takes, and holds the bytes that the formula says."""

from __future__ import annotations

import numpy as np
import pytest

from trainfleet.comm.threads import run_ranks
from trainfleet.errors import PeerError, PlanError
from trainfleet.mpi.layers import Linear, Sequential, Tanh
from trainfleet.mpi.optimizers import SGD, Adam, AdamW, Momentum
from trainfleet.mpi.zero import Memory, Sharded, Zero

OPTIMIZERS = {
    "sgd": lambda: SGD(learning_rate=0.1),
    "momentum": lambda: Momentum(learning_rate=0.1),
    "adam": lambda: Adam(learning_rate=0.1),
    "adamw": lambda: AdamW(learning_rate=0.1),
}
X = np.random.default_rng(9).normal(size=(12, 5))


def model(dtype=np.float64):
    draw = np.random.default_rng(0)
    # Rows of 7 and of 1, which two ranks do not divide.
    return Sequential([Linear.random(5, 7, draw, dtype), Tanh(), Linear.random(7, 1, draw, dtype)])


def gradients_of(layers, x):
    y, saved = layers.forward(x)
    return layers.backward(saved, (y - 1) / len(X))[1]


def stepped(group, stage, name, steps):
    layers = model()
    zero = Zero(OPTIMIZERS[name](), stage, group)
    zero.register(layers.parameters)
    sharded = Sequential({key: Sharded(layer, zero, key) for key, layer in layers.layers.items()})
    for _ in range(steps):
        for half in (X[:6], X[6:]):  # two micro-batches
            if gradients := gradients_of(sharded if stage >= 2 else layers, half[group.rank :: group.size]):
                zero.reduce_gradients(gradients)
        zero.step(scale=group.size)
    return zero.gather(layers.parameters), zero.memory_held()


def in_one_process(name, steps):
    layers, rule = model(), OPTIMIZERS[name]()
    memory = {key: {kind: np.zeros_like(w) for kind in rule.memories} for key, w in layers.parameters.items()}
    for step in range(1, steps + 1):
        for key, gradient in gradients_of(layers, X).items():
            layers.parameters[key] = rule.update(layers.parameters[key], gradient, memory[key], step)
    return dict(layers.parameters)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_stage_takes_the_steps_of_one_process(run, stage, name):
    expected = in_one_process(name, 3)
    for parameters, _ in run(2, stepped, stage, name, 3):
        for key, value in parameters.items():
            np.testing.assert_allclose(value, expected[key], rtol=1e-9, atol=1e-12, err_msg=key)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_on_three_ranks_some_bands_are_short_or_empty(run, stage):
    expected = in_one_process("adamw", 2)
    for parameters, _ in run(3, stepped, stage, "adamw", 2):
        for key, value in parameters.items():
            np.testing.assert_allclose(value, expected[key], rtol=1e-9, err_msg=key)


def held(group, stage):
    layers = Sequential([Linear.random(32, 64, np.random.default_rng(0))])
    zero = Zero(AdamW(learning_rate=0.1), stage, group)
    zero.register(layers.parameters)
    zero.reduce_gradients({"0.weight": np.ones((64, 32), np.float32), "0.bias": np.ones(64, np.float32)})
    return zero.memory_held()


@pytest.mark.parametrize(("stage", "parts"), [(0, (1, 1, 1)), (1, (1, 1, 2)), (2, (1, 2, 2)), (3, (2, 2, 2))])
def test_each_stage_splits_one_thing_more(run, stage, parts):
    whole = 4 * (64 * 32 + 64)
    parameters, gradients, state = parts
    expected = Memory(parameters=whole // parameters, gradients=whole // gradients, optimizer_state=2 * whole // state)
    assert run(2, held, stage) == [expected] * 2


def of_ranks(group):
    zero = Zero(SGD(learning_rate=1, momentum=0.9), 3, group)
    zero.register({"w": np.ones((3, 2), np.float32)})
    return zero.memory_of_ranks()


def test_every_rank_knows_what_each_holds(run):
    bands = [
        Memory(parameters=16, gradients=0, optimizer_state=16),
        Memory(parameters=8, gradients=0, optimizer_state=8),
    ]
    assert run(2, of_ranks) == [bands, bands]


def registered_unlike(group, stage):
    zero = Zero(SGD(learning_rate=1), stage, group)
    zero.register({"w": np.ones((4, 2)), "v": np.ones((4, 2))})
    with pytest.raises(ValueError, match=r"gradient of 'w' has the shape \(3, 2\), its parameter \(4, 2\)"):
        zero.reduce_gradients({"w": np.ones((3, 2))})
    with pytest.raises(PeerError) as caught:
        zero.reduce_gradients({"w" if group.rank else "v": np.ones((4, 2))})
        zero.step()
    with pytest.raises(PeerError, match="'b' float64"):
        Zero(SGD(learning_rate=1), stage, group.split(0)).register({"b" if group.rank else "a": np.ones(2)})
    return str(caught.value)


@pytest.mark.parametrize("stage", [1, 2])
def test_ranks_that_bring_unlike_parameters_or_gradients_are_named(run, stage):
    for sentence in run(2, registered_unlike, stage):
        assert "'v' float64 (4, 2) on rank 0 of 2, 'w' float64 (4, 2) on rank 1" in sentence


def test_an_unknown_stage_or_gradient_is_refused():
    with pytest.raises(PlanError, match="The stage of ZeRO is 4"):
        run_ranks(1, lambda group: Zero(SGD(learning_rate=1), 4, group))
    with pytest.raises(KeyError, match="which was not registered"):
        run_ranks(1, lambda group: Zero(SGD(learning_rate=1), 1, group).reduce_gradients({"x": np.ones(1)}))


def test_it_is_torchs_adamw():
    torch = pytest.importorskip("torch", reason="the oracle is torch's optimizer")
    twin = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 1)).double()
    twin.load_state_dict({name: torch.tensor(value) for name, value in model().parameters.items()})
    optimizer = torch.optim.AdamW(twin.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        ((twin(torch.tensor(X)) - 1).square().sum() / 2 / len(X)).backward()
        optimizer.step()
    ((ours, _), _) = run_ranks(2, lambda group: stepped(group, 3, "adamw", 3))
    for name, parameter in twin.named_parameters():
        np.testing.assert_allclose(ours[name], parameter.detach(), rtol=1e-9)
