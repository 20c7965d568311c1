"""A Keras model trains among NumPy layers as it trains by Keras's own optimizer, and TensorFlow is not there."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from trainfleet.comm.threads import run_ranks
from trainfleet.errors import ConfigError
from trainfleet.mpi.cross_entropy import cross_entropy
from trainfleet.mpi.layers import Linear, Sequential
from trainfleet.mpi.mesh import Mesh
from trainfleet.mpi.optimizers import AdamW
from trainfleet.mpi.trainer import Trainer
from trainfleet.plan import Plan

BACKENDS = [name for name in ("torch", "jax") if importlib.util.find_spec(name)]
if importlib.util.find_spec("keras") is None:
    pytest.skip("Keras is not installed: pip install 'trainfleet[keras]'", allow_module_level=True)
if not BACKENDS:
    pytest.skip("Keras needs torch or JAX for its derivatives", allow_module_level=True)

X = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
TARGETS = np.random.default_rng(1).integers(0, 4, 8)


def keras():
    os.environ.setdefault("KERAS_BACKEND", BACKENDS[0])
    import keras

    return keras


def model():
    k = keras()
    made = k.Sequential([k.layers.Dense(5), k.layers.LayerNormalization(), k.layers.Activation("tanh")])
    made.build((None, 6))
    draw = np.random.default_rng(2)
    made.set_weights([(draw.normal(size=each.shape) * 0.4).astype(np.float32) for each in made.get_weights()])
    return made


def losses(group, plan):
    from trainfleet.mpi.keras_model import KerasLayer

    mesh = Mesh(group, plan)
    data = mesh.data_axes
    whole = Sequential([KerasLayer(model()), Linear.random(5, 4, np.random.default_rng(0))])
    batch = (X[data.rank :: data.size], TARGETS[data.rank :: data.size])
    found = Trainer(whole, AdamW(learning_rate=0.05), cross_entropy, [batch] * 4, mesh=mesh).fit(4)
    assert "tensorflow" not in sys.modules
    return found


def in_keras():
    k = keras()
    head = Linear.random(5, 4, np.random.default_rng(0))
    last = k.layers.Dense(4)
    whole = k.Sequential([model(), last])
    whole.build((None, 6))
    last.set_weights([head.parameters["weight"].T, head.parameters["bias"]])
    rule = k.optimizers.AdamW(0.05, weight_decay=0.01, epsilon=1e-8)
    whole.compile(rule, k.losses.SparseCategoricalCrossentropy(from_logits=True))
    return [float(whole.train_on_batch(X, TARGETS)) for _ in range(4)]


@pytest.fixture(scope="module")
def expected():
    return in_keras()


@pytest.mark.parametrize("plan", [Plan(), Plan(zero=1), Plan(zero=2), Plan(zero=3), Plan(pp=2)], ids=str)
def test_it_has_the_losses_of_keras(expected, plan):
    for found in run_ranks(2, lambda group: losses(group, plan)):
        np.testing.assert_allclose(found, expected, rtol=2e-4)


@pytest.mark.matrix
def test_it_has_them_under_mpi(run_mpi, expected):
    for found in run_mpi(2, losses, Plan(zero=3)):
        np.testing.assert_allclose(found, expected, rtol=2e-4)


def test_weights_go_back_into_the_keras_model():
    from trainfleet.mpi.keras_model import KerasLayer

    made = model()
    layer = KerasLayer(made)
    assert list(layer.parameters) == ["0.kernel", "1.bias", "2.gamma", "3.beta"]
    layer.parameters["1.bias"] = np.full(5, 4, np.float32)
    layer.write_back()
    assert made.get_weights()[1].tolist() == [4.0] * 5


def test_moving_averages_move_and_whole_numbers_have_no_derivative():
    from trainfleet.mpi.keras_model import KerasLayer

    k = keras()
    made = k.Sequential([k.layers.Embedding(7, 3), k.layers.BatchNormalization(momentum=0.5)])
    made.build((None, 2))
    layer = KerasLayer(made)
    y, saved = layer.forward(np.array([[1, 2], [3, 1]]))
    dx, gradients = layer.backward(saved, np.ones_like(y))
    assert dx is None and gradients["0.embeddings"].shape == (7, 3)
    np.testing.assert_array_equal(gradients["0.embeddings"][[0, 4, 5, 6]], 0)
    rows = layer.parameters["0.embeddings"][[1, 2, 3, 1]]
    np.testing.assert_allclose(made.layers[1].get_weights()[2], rows.mean(axis=0) / 2, rtol=1e-5)


def test_a_model_without_weights_or_derivatives_is_refused(monkeypatch):
    from trainfleet.mpi.keras_model import KerasLayer

    k = keras()
    with pytest.raises(ConfigError, match=r"Call model\.build"):
        KerasLayer(k.Sequential([k.layers.Dense(5)]))
    monkeypatch.setattr(k.backend, "backend", lambda: "numpy")
    with pytest.raises(ConfigError, match=r"backend of Keras is 'numpy'.*KERAS_BACKEND=jax"):
        KerasLayer(model())


@pytest.mark.matrix
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_the_other_backend_passes_the_same_tests(backend):
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not matrix", str(Path(__file__))]
    environment = {**os.environ, "KERAS_BACKEND": backend}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout
