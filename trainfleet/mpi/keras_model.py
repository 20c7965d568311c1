"""A Keras model as a layer: NumPy in and out, the derivative of Keras's own backend, torch or JAX.

Keras keeps the architecture; the numbers live here, so that they are averaged, shared and saved like those of any other
layer. TensorFlow is not needed: `KERAS_BACKEND=jax` or `torch` in the environment, before Keras is imported.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import numpy as np

from trainfleet.deps import require
from trainfleet.errors import ConfigError
from trainfleet.mpi.arrays import Array, to_numpy
from trainfleet.mpi.layers import Cuts, Gradients, Saved


class KerasLayer:
    """`forward` and `backward` of any built Keras layer or model with one array in and one out, on the CPU.

    Its trainable weights are the parameters, named by number and by Keras: `0.kernel`, `1.bias`. What else it holds, as
    moving averages, stays on each rank, as it would in Keras without a distribution. `write_back` gives the weights to
    the Keras model, to save or to predict by it.
    """

    def __init__(self, model: Any) -> None:
        if not model.built:
            raise ConfigError("This Keras model has no weights yet. Call model.build((None, num_inputs)) first.")
        self._model = model
        self._derive = _derivatives()
        variables = model.trainable_variables
        self._variables = {f"{index}.{variable.name}": variable for index, variable in enumerate(variables)}
        self.parameters: MutableMapping[str, Array] = {
            name: np.array(to_numpy(_detached(variable))) for name, variable in self._variables.items()
        }
        self.cuts: Cuts = {}

    def forward(self, x: Array) -> tuple[Array, Saved]:
        others = [variable.value for variable in self._model.non_trainable_variables]
        y, others, backward = self._derive(self._model, list(self.parameters.values()), others, to_numpy(x))
        for variable, value in zip(self._model.non_trainable_variables, others, strict=True):
            variable.assign(value)
        return y, backward

    def backward(self, saved: Saved, dy: Array) -> tuple[Array, Gradients]:
        dx, gradients = saved(np.ascontiguousarray(to_numpy(dy)))
        return dx, dict(zip(self.parameters, gradients, strict=True))

    def write_back(self, parameters: Mapping[str, Array] | None = None) -> None:
        """Put the weights into the Keras model: those held here, or the whole ones that `Zero.gather` gave."""
        for name, value in (parameters or self.parameters).items():
            self._variables[name].assign(to_numpy(value))


def _derivatives() -> Any:
    """How this Keras computes outputs and derivatives; ConfigError where it cannot."""
    keras = require("keras", "keras", purpose="KerasLayer")
    backend = keras.backend.backend()
    found = {"torch": _by_torch, "jax": _by_jax}.get(backend)
    if found is None:
        raise ConfigError(
            f"The backend of Keras is {backend!r}, by which a layer over MPI has no derivative. "
            "Set KERAS_BACKEND=jax or KERAS_BACKEND=torch before Keras is imported."
        )
    return found


def _detached(variable: Any) -> Any:
    value = variable.value
    return value.detach() if hasattr(value, "detach") else value


def _by_jax(model: Any, parameters: list[Any], others: list[Any], x: Any) -> tuple[Any, list[Any], Any]:
    jax = require("jax", "jax", purpose="KerasLayer on the backend jax")

    def compute(parameters: list[Any], x: Any) -> tuple[Any, list[Any]]:
        y, changed = model.stateless_call(parameters, others, x, training=True)
        return y, changed

    wanted = [jax.numpy.asarray(each) for each in parameters]
    if np.issubdtype(x.dtype, np.floating):
        y, derive, changed = jax.vjp(compute, wanted, jax.numpy.asarray(x), has_aux=True)
    else:
        y, derive, changed = jax.vjp(lambda p: compute(p, x), wanted, has_aux=True)

    def backward(dy: Any) -> tuple[Any, list[Any]]:
        gradients, *dx = derive(jax.numpy.asarray(dy, dtype=y.dtype))
        return (np.asarray(dx[0]) if dx else None), [np.array(each) for each in gradients]

    return np.asarray(y), changed, backward


def _by_torch(model: Any, parameters: list[Any], others: list[Any], x: Any) -> tuple[Any, list[Any], Any]:
    torch = require("torch", "torch", purpose="KerasLayer on the backend torch")
    wanted = [torch.from_numpy(np.ascontiguousarray(each)).requires_grad_() for each in parameters]
    entry = torch.from_numpy(np.ascontiguousarray(x))
    entry.requires_grad_(entry.is_floating_point())
    with torch.enable_grad():
        y, changed = model.stateless_call(wanted, [other.detach().clone() for other in others], entry, training=True)

    def backward(dy: Any) -> tuple[Any, list[Any]]:
        inputs = [*wanted, *([entry] if entry.requires_grad else [])]
        found = torch.autograd.grad(y, inputs, torch.from_numpy(dy).to(y.dtype), allow_unused=True)
        arrays = [(torch.zeros_like(w) if g is None else g).numpy() for w, g in zip(inputs, found)]
        return (arrays.pop() if entry.requires_grad else None), arrays

    return y.detach().numpy(), [each.detach() for each in changed], backward
