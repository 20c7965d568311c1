"""A torch module as a layer: NumPy in and out, torch's own derivative.

Its parameters are averaged, shared and saved like those of any other layer.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any

import numpy as np

from trainfleet.deps import require
from trainfleet.mpi.arrays import Array, to_numpy
from trainfleet.mpi.layers import Cuts, Gradients, Saved


class TorchLayer:
    """`forward` and `backward` of any module with one tensor in and one out, on the CPU. Buffers are not exchanged."""

    def __init__(self, module: Any) -> None:
        self._torch = require("torch", "torch", purpose="TorchLayer")
        self._module = module
        self.parameters: MutableMapping[str, Array] = _Parameters(dict(module.named_parameters()), self._torch)
        self.cuts: Cuts = {}

    def forward(self, x: Array) -> tuple[Array, Saved]:
        torch = self._torch
        entry = torch.from_numpy(np.ascontiguousarray(to_numpy(x)))
        entry.requires_grad_(entry.is_floating_point())
        with torch.enable_grad():
            y = self._module(entry)
        return y.detach().numpy(), (entry, y)

    def backward(self, saved: Saved, dy: Array) -> tuple[Array, Gradients]:
        entry, y = saved
        named = {name: p for name, p in self._module.named_parameters() if p.requires_grad}
        wanted = [*([entry] if entry.requires_grad else []), *named.values()]
        derivative = self._torch.from_numpy(np.ascontiguousarray(dy)).to(y.dtype)
        found = self._torch.autograd.grad(y, wanted, derivative, allow_unused=True)
        arrays = [(self._torch.zeros_like(w) if g is None else g).detach().numpy() for w, g in zip(wanted, found)]
        dx = arrays.pop(0) if entry.requires_grad else None
        return dx, dict(zip(named, arrays, strict=True))


class _Parameters(MutableMapping[str, Any]):
    """Parameters as NumPy arrays that share their memory. What is set becomes the parameter's memory, of any shape."""

    def __init__(self, named: dict[str, Any], torch: Any) -> None:
        self._named = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
        self._torch = torch

    def __getitem__(self, name: str) -> Any:
        return self._named[name].detach().numpy()

    def __setitem__(self, name: str, value: Any) -> None:
        self._named[name].data = self._torch.from_numpy(np.ascontiguousarray(value))

    def __delitem__(self, name: str) -> None:
        raise TypeError("A module's parameters are set, not removed.")

    def __iter__(self) -> Iterator[str]:
        return iter(self._named)

    def __len__(self) -> int:
        return len(self._named)
