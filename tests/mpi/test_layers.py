"""Each derivative beside torch's, and beside differences of the function itself."""

from __future__ import annotations

import numpy as np
import pytest

from trainfleet.mpi.attention import SelfAttention, transformer_block
from trainfleet.mpi.layers import GELU, Embedding, LayerNorm, Linear, ReLU, Residual, Sequential, Tanh, mlp

DRAW = np.random.default_rng(0)
WIDTH = 6


def layers():
    draw = np.random.default_rng(1)
    norm = LayerNorm({"weight": draw.normal(size=WIDTH), "bias": draw.normal(size=WIDTH)})
    return {
        "linear": Linear.random(WIDTH, 4, draw, np.float64),
        "linear without bias": Linear({"weight": draw.normal(size=(4, WIDTH))}),
        "tanh": Tanh(),
        "relu": ReLU(),
        "gelu": GELU(),
        "norm": norm,
        "residual": Residual([norm, Linear.random(WIDTH, WIDTH, draw, np.float64)]),
        "mlp": mlp([WIDTH, 5, 3], dtype=np.float64),
        "attention": SelfAttention.random(WIDTH, 2, draw, causal=True, dtype=np.float64),
        "block": transformer_block(WIDTH, 3, draw, dtype=np.float64),
    }


@pytest.mark.parametrize("name", layers())
def test_backward_is_the_derivative_of_forward(name):
    layer, x = layers()[name], np.random.default_rng(2).normal(size=(2, 3, WIDTH))
    y, saved = layer.forward(x)
    dy = np.random.default_rng(3).normal(size=y.shape)
    dx, gradients = layer.backward(saved, dy)
    assert gradients.keys() == layer.parameters.keys()

    def derivative(array):
        found = np.zeros_like(array)
        for index in np.ndindex(array.shape):
            kept = array[index]
            values = []
            for step in (1e-6, -1e-6):
                array[index] = kept + step
                values.append((layer.forward(x)[0] * dy).sum())
            array[index] = kept
            found[index] = (values[0] - values[1]) / 2e-6
        return found

    np.testing.assert_allclose(dx, derivative(x), rtol=1e-5, atol=1e-7)
    for key, gradient in gradients.items():
        np.testing.assert_allclose(gradient, derivative(layer.parameters[key]), rtol=1e-5, atol=1e-7, err_msg=key)


def test_an_embedding_adds_up_the_places_of_a_row():
    layer = Embedding({"weight": np.arange(8.0).reshape(4, 2)})
    y, saved = layer.forward(np.array([[1, 3], [1, 0]]))
    assert y[1].tolist() == [[2.0, 3.0], [0.0, 1.0]]
    _, gradients = layer.backward(saved, np.ones_like(y))
    assert gradients["weight"].tolist() == [[1, 1], [2, 2], [0, 0], [1, 1]]


@pytest.mark.parametrize("name", ["linear", "tanh", "relu", "gelu", "norm", "attention"])
def test_it_is_torchs_module(name):
    torch = pytest.importorskip("torch", reason="the oracle is torch's modules")
    nn = torch.nn
    layer = layers()[name]
    twin = {
        "linear": nn.Linear(WIDTH, 4),
        "tanh": nn.Tanh(),
        "relu": nn.ReLU(),
        "gelu": nn.GELU(approximate="tanh"),
        "norm": nn.LayerNorm(WIDTH),
        "attention": nn.MultiheadAttention(WIDTH, 2, batch_first=True),
    }[name].double()
    state = {key: torch.tensor(value) for key, value in layer.parameters.items()}
    if name == "attention":
        for kind, joined in (("weight", "in_proj_weight"), ("bias", "in_proj_bias")):
            state[joined] = torch.cat([state.pop(f"{part}.{kind}") for part in ("query", "key", "value")])
            state[f"out_proj.{kind}"] = state.pop(f"out.{kind}")
    twin.load_state_dict(state)
    x = torch.randn(2, 3, WIDTH, dtype=torch.float64, requires_grad=True)
    mask = torch.triu(torch.ones(3, 3, dtype=torch.bool), 1)
    expected = twin(x, x, x, attn_mask=mask)[0] if name == "attention" else twin(x)
    expected.sum().backward()
    y, saved = layer.forward(x.detach().numpy())
    dx, gradients = layer.backward(saved, np.ones_like(y))
    np.testing.assert_allclose(y, expected.detach(), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(dx, x.grad, rtol=1e-10, atol=1e-12)
    if name != "attention":
        for key, parameter in twin.named_parameters():
            np.testing.assert_allclose(gradients[key], parameter.grad, rtol=1e-10)


def test_parameters_of_several_layers_are_one_mapping_that_sets_through():
    model = Sequential({"a": Linear({"weight": np.ones((2, 2))}), "b": mlp([2, 2, 2])})
    assert list(model.parameters) == ["a.weight", "b.0.weight", "b.0.bias", "b.2.weight", "b.2.bias"]
    assert len(model.parameters) == 5 and "c.weight" not in model.parameters
    model.parameters["b.2.bias"] = np.full(2, 7.0)
    assert model.layers["b"].layers["2"].parameters["bias"][0] == 7
    with pytest.raises(TypeError):
        del model.parameters["a.weight"]
