"""Activations kept at the borders of segments only, and computed again in backward: Chen et al., arXiv:1604.06174.

With n layers of equal activations a in k segments, forward keeps k inputs, and backward makes n/k of one segment:
k + n/k instead of n, least at k = sqrt(n), for one forward more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trainfleet.balance import cut
from trainfleet.errors import PlanError
from trainfleet.mpi.arrays import Array
from trainfleet.mpi.layers import Gradients, Layer, Saved, Sequential


class Recompute(Sequential):
    """The same layers, in `segments`: a number of them, or the names of the layers with which they begin."""

    def __init__(self, model: Sequential, segments: int | Sequence[str]) -> None:
        super().__init__(model.layers)
        names = list(self.layers)
        if isinstance(segments, int):
            if not 1 <= segments <= len(names):
                raise PlanError(f"{len(names)} layers cannot be cut into {segments} segments; use 1 to {len(names)}.")
            firsts = [names[part.start] for part in cut([1.0] * len(names), segments)]
        else:
            unknown = [name for name in segments if name not in self.layers]
            if unknown:
                raise PlanError(f"There is no layer {', '.join(map(repr, unknown))}; there are {', '.join(names)}.")
            firsts = sorted({names[0], *segments}, key=names.index)
        starts = [names.index(name) for name in firsts]
        ends = [*starts[1:], len(names)]
        self.segments = [
            Sequential({name: self.layers[name] for name in names[first:end]}) for first, end in zip(starts, ends)
        ]

    def with_layers(self, layers: Mapping[str, Layer]) -> Recompute:
        return Recompute(Sequential(layers), [next(iter(segment.layers)) for segment in self.segments])

    def forward(self, x: Array) -> tuple[Array, Saved]:
        inputs = []
        for segment in self.segments:
            inputs.append(x)
            for layer in segment.layers.values():
                x = layer.forward(x)[0]  # what it would keep is let go, layer by layer
        return x, inputs

    def backward(self, saved: Saved, dy: Array) -> tuple[Array, Gradients]:
        gradients: Gradients = {}
        for segment in reversed(self.segments):
            _, again = segment.forward(saved.pop())
            dy, own = segment.backward(again, dy)
            gradients |= own
        return dy, gradients
