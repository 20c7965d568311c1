"""Layers with a forward and a backward written by hand: a model is parameters, forward, backward.

    y, saved = layer.forward(x)
    dx, gradients = layer.backward(saved, dy)       # gradients by the names of `layer.parameters`

Nothing is kept in a layer between the two: whoever calls holds `saved`, so that several batches may be under way, as
in a pipeline, or none, as when the forward is computed again. Weights lie as in torch, [out, in]: y = x W^T + b.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np

from trainfleet.comm.group import Group
from trainfleet.mpi.arrays import Array, namespace

Saved: TypeAlias = Any
Gradients: TypeAlias = dict[str, Array]
Cuts: TypeAlias = Mapping[str, tuple[int, Group]]


class Layer(Protocol):
    """A function with parameters and its derivative."""

    @property
    def parameters(self) -> MutableMapping[str, Array]: ...

    @property
    def cuts(self) -> Cuts:
        """Of parameters that are pieces of a whole: the dimension that is cut, and the group over which."""
        ...

    def forward(self, x: Array) -> tuple[Array, Saved]: ...

    def backward(self, saved: Saved, dy: Array) -> tuple[Array, Gradients]: ...


class Plain:
    """What a layer has that nobody cuts."""

    def __init__(self, parameters: MutableMapping[str, Array] | None = None, cuts: Cuts | None = None) -> None:
        self.parameters: MutableMapping[str, Array] = {} if parameters is None else parameters
        self.cuts: Cuts = cuts or {}


class Function(Plain):
    """A function without parameters whose derivative you wrote: `forward(x)` gives the answer and what backward needs,
    `backward(saved, dy)` the derivative by x."""

    def __init__(
        self, forward: Callable[[Array], tuple[Array, Saved]], backward: Callable[[Saved, Array], Array]
    ) -> None:
        super().__init__()
        self._forward, self._backward = forward, backward

    def forward(self, x: Array) -> tuple[Array, Saved]:
        return self._forward(x)

    def backward(self, saved: Saved, dy: Array) -> tuple[Array, Gradients]:
        return self._backward(saved, dy), {}


class Linear(Plain):
    """y = x W^T + b; dx = dy W, dW = dy^T x, db = sum of dy."""

    @classmethod
    def random(cls, num_in: int, num_out: int, generator: np.random.Generator, dtype: Any = np.float32) -> Linear:
        """Uniform within 1 / sqrt(num_in), as torch begins."""
        bound = 1 / math.sqrt(num_in)
        weight = generator.uniform(-bound, bound, (num_out, num_in)).astype(dtype)
        return cls({"weight": weight, "bias": generator.uniform(-bound, bound, num_out).astype(dtype)})

    def forward(self, x: Array) -> tuple[Array, Saved]:
        return affine(x, self.parameters["weight"], self.parameters.get("bias")), x

    def backward(self, saved: Saved, dy: Array) -> tuple[Array, Gradients]:
        return dy @ self.parameters["weight"], affine_gradients(saved, dy, "bias" in self.parameters)


def affine(x: Array, weight: Array, bias: Array | None) -> Array:
    y = x @ weight.T
    return y if bias is None else y + bias


def affine_gradients(x: Array, dy: Array, has_bias: bool) -> Gradients:
    """Over all leading dimensions, which are those of batch and tokens."""
    xp = namespace(dy)
    rows_in, rows_out = xp.reshape(x, (-1, x.shape[-1])), xp.reshape(dy, (-1, dy.shape[-1]))
    gradients = {"weight": rows_out.T @ rows_in}
    return gradients | {"bias": xp.sum(rows_out, axis=0)} if has_bias else gradients


class Tanh(Plain):
    def forward(self, x: Array) -> tuple[Array, Saved]:
        y = namespace(x).tanh(x)
        return y, y

    def backward(self, saved: Saved, dy: Array) -> tuple[Array, Gradients]:
        return dy * (1 - saved * saved), {}


class ReLU(Plain):
    def forward(self, x: Array) -> tuple[Array, Saved]:
        y = x * (x > 0)
        return y, y

    def backward(self, saved: Saved, dy: Array) -> tuple[Array, Gradients]:
        return dy * (saved > 0), {}


class GELU(Plain):
    """x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2: Hendrycks & Gimpel, arXiv:1606.08415, the approximate form."""

    def forward(self, x: Array) -> tuple[Array, Saved]:
        t = self._tanh(x)
        return 0.5 * x * (1 + t), x

    def backward(self, saved: Saved, dy: Array) -> tuple[Array, Gradients]:
        x = saved
        t = self._tanh(x)
        inner = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x * x)
        return dy * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * inner), {}

    @staticmethod
    def _tanh(x: Array) -> Array:
        return namespace(x).tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))


class LayerNorm(Plain):
    """y = weight * n + bias with n = (x - mean) / sqrt(variance + eps): Ba et al., arXiv:1607.06450, equation 4."""

    def __init__(self, parameters: MutableMapping[str, Array], eps: float = 1e-5) -> None:
        super().__init__(parameters)
        self.eps = eps

    @classmethod
    def ones(cls, width: int, dtype: Any = np.float32) -> LayerNorm:
        return cls({"weight": np.ones(width, dtype), "bias": np.zeros(width, dtype)})

    def forward(self, x: Array) -> tuple[Array, Saved]:
        xp = namespace(x)
        centred = x - xp.mean(x, axis=-1, keepdims=True)
        deviation = xp.sqrt(xp.mean(centred * centred, axis=-1, keepdims=True) + self.eps)
        normal = centred / deviation
        return self.parameters["weight"] * normal + self.parameters["bias"], (normal, deviation)

    def backward(self, saved: Saved, dy: Array) -> tuple[Array, Gradients]:
        normal, deviation = saved
        xp = namespace(dy)
        dn = dy * self.parameters["weight"]
        along = {"axis": -1, "keepdims": True}
        dx = (dn - xp.mean(dn, **along) - normal * xp.mean(dn * normal, **along)) / deviation
        rows = tuple(range(dy.ndim - 1))
        return dx, {"weight": xp.sum(dy * normal, axis=rows), "bias": xp.sum(dy, axis=rows)}


class Embedding(Plain):
    """Rows of a table by number; the gradient of a row is the sum over the places where it stood."""

    @classmethod
    def random(cls, num_rows: int, width: int, generator: np.random.Generator, dtype: Any = np.float32) -> Embedding:
        return cls({"weight": (0.02 * generator.standard_normal((num_rows, width))).astype(dtype)})

    def forward(self, x: Array) -> tuple[Array, Saved]:
        return self.parameters["weight"][x], x

    def backward(self, saved: Saved, dy: Array) -> tuple[Array, Gradients]:
        table = self.parameters["weight"]
        xp = namespace(dy)
        chosen = xp.reshape(saved, (-1, 1)) == xp.arange(table.shape[0])  # a row for each token
        gradient = chosen.astype(dy.dtype).T @ xp.reshape(dy, (-1, dy.shape[-1]))
        return None, {"weight": gradient}


class Joined(MutableMapping[str, Any]):
    """The parameters of several layers as one mapping, `0.weight` for that of layer 0; what is set is set there."""

    def __init__(self, layers: Mapping[str, Layer]) -> None:
        self._layers = layers

    def __getitem__(self, name: str) -> Any:
        layer, _, rest = name.partition(".")
        if layer not in self._layers:
            raise KeyError(name)
        return self._layers[layer].parameters[rest]

    def __setitem__(self, name: str, value: Any) -> None:
        layer, _, rest = name.partition(".")
        self._layers[layer].parameters[rest] = value

    def __delitem__(self, name: str) -> None:
        raise TypeError("A model's parameters are set, not removed.")

    def __iter__(self) -> Iterator[str]:
        return (f"{name}.{own}" for name, layer in self._layers.items() for own in layer.parameters)

    def __len__(self) -> int:
        return sum(len(layer.parameters) for layer in self._layers.values())


class Sequential:
    """One layer after the other; `layers` are named `0`, `1`, ... or as the mapping says."""

    def __init__(self, layers: Sequence[Layer] | Mapping[str, Layer]) -> None:
        if not isinstance(layers, Mapping):
            layers = {str(index): layer for index, layer in enumerate(layers)}
        self.layers: dict[str, Layer] = dict(layers)

    @property
    def parameters(self) -> MutableMapping[str, Array]:
        return Joined(self.layers)

    def with_layers(self, layers: Mapping[str, Layer]) -> Sequential:
        """The same of other layers under the same names, as their parts on one rank."""
        return type(self)(layers)

    @property
    def cuts(self) -> Cuts:
        return {f"{name}.{own}": cut for name, layer in self.layers.items() for own, cut in layer.cuts.items()}

    def forward(self, x: Array) -> tuple[Array, Saved]:
        saved = []
        for layer in self.layers.values():
            x, kept = layer.forward(x)
            saved.append(kept)
        return x, saved

    def backward(self, saved: Saved, dy: Array) -> tuple[Array, Gradients]:
        gradients: Gradients = {}
        for name, layer in reversed(self.layers.items()):
            dy, own = layer.backward(saved.pop(), dy)  # what is used up is let go
            gradients |= {f"{name}.{key}": value for key, value in own.items()}
        return dy, gradients


class Residual(Sequential):
    """x + the layers' answer to x: He et al., arXiv:1512.03385, equation 1."""

    def forward(self, x: Array) -> tuple[Array, Saved]:
        y, saved = super().forward(x)
        return x + y, saved

    def backward(self, saved: Saved, dy: Array) -> tuple[Array, Gradients]:
        dx, gradients = super().backward(saved, dy)
        return dx + dy, gradients


def mlp(widths: Sequence[int], *, seed: int = 0, dtype: Any = np.float32) -> Sequential:
    """Linear layers of these widths with GELU between them."""
    generator = np.random.default_rng(seed)
    layers: list[Layer] = []
    for num_in, num_out in itertools.pairwise(widths):
        layers += [Linear.random(num_in, num_out, generator, dtype), GELU()]
    return Sequential(layers[:-1])
