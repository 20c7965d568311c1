"""Linear layers split over ranks by columns or by rows, and the pair of both with one exchange each way.

Shoeybi et al., arXiv:1909.08053, section 3, in torch's layout W [out, in], so that "by column" cuts rows of W:

    column   y_i = x W_i^T + b_i    forward: nothing             backward: dx = sum of dy_i W_i     (their f)
    row      y = sum of x_i W_i^T + b    forward: that sum       backward: nothing                   (their g)

Column, then anything element by element, then row needs one sum forward and one backward.
"""

from __future__ import annotations

from typing import Literal

from trainfleet.comm.group import Group
from trainfleet.errors import PlanError
from trainfleet.mpi.arrays import Array, all_sum, for_group, like, namespace
from trainfleet.mpi.layers import Gradients, Layer, Linear, Plain, Saved, Sequential, affine, affine_gradients


def split_linear(
    linear: Linear, group: Group, by: Literal["column", "row"], *, gather_output: bool = False
) -> ColumnLinear | RowLinear:
    """This rank's part of a layer that every rank has whole.

    By column each rank has some of the outputs, or with `gather_output` all of them; by row it takes its part of the
    inputs, as a layer split by column leaves it. PlanError where the ranks do not divide the width.
    """
    dim = 0 if by == "column" else 1
    weight = linear.parameters["weight"]
    refuse_uneven(weight.shape[dim], group, "outputs" if dim == 0 else "inputs")
    parameters = {"weight": part_of(weight, group, dim)}
    if "bias" in linear.parameters:
        bias = linear.parameters["bias"]
        parameters["bias"] = part_of(bias, group, 0) if dim == 0 else bias
    return ColumnLinear(parameters, group, gather_output=gather_output) if dim == 0 else RowLinear(parameters, group)


def part_of(array: Array, group: Group, dim: int) -> Array:
    """Of equal parts along a dimension, that of this rank, in memory of its own."""
    length = array.shape[dim] // group.size
    index = [slice(None)] * array.ndim
    index[dim] = slice(group.rank * length, (group.rank + 1) * length)
    return array[tuple(index)] * 1


def refuse_uneven(count: int, group: Group, what: str) -> None:
    if count % group.size:
        divisors = [d for d in range(1, count + 1) if count % d == 0]
        raise PlanError(f"{group.size} ranks do not divide {count} {what}. Use tp = one of {divisors}.")


class ColumnLinear(Plain):
    """Some of the outputs from all of the inputs."""

    def __init__(self, parameters: dict[str, Array], group: Group, *, gather_output: bool = False) -> None:
        super().__init__(parameters, dict.fromkeys(parameters, (0, group)))
        self._group = group
        self._gather_output = gather_output

    def forward(self, x: Array) -> tuple[Array, Saved]:
        y = affine(x, self.parameters["weight"], self.parameters.get("bias"))
        if self._gather_output:
            held = for_group(y, self._group)
            y = like(y, namespace(held).concatenate(self._group.all_gather(held), axis=-1))
        return y, x

    def backward(self, saved: Saved, dy: Array) -> tuple[Array, Gradients]:
        if self._gather_output:
            dy = part_of(dy, self._group, dy.ndim - 1)
        dx = all_sum(dy @ self.parameters["weight"], self._group)
        return dx, affine_gradients(saved, dy, "bias" in self.parameters)


class RowLinear(Plain):
    """All of the outputs from some of the inputs; the bias, which every rank has, is added once."""

    def __init__(self, parameters: dict[str, Array], group: Group) -> None:
        super().__init__(parameters, {"weight": (1, group)})
        self._group = group

    def forward(self, x: Array) -> tuple[Array, Saved]:
        y = all_sum(affine(x, self.parameters["weight"], None), self._group)
        return (y + self.parameters["bias"] if "bias" in self.parameters else y), x

    def backward(self, saved: Saved, dy: Array) -> tuple[Array, Gradients]:
        return dy @ self.parameters["weight"], affine_gradients(saved, dy, "bias" in self.parameters)


class LinearPair(Sequential):
    """Linear, activation, linear as Megatron's MLP block: by column and by row, one sum forward and one backward."""

    @classmethod
    def split(cls, first: Linear, activation: Layer, second: Linear, group: Group) -> LinearPair:
        return cls([split_linear(first, group, "column"), activation, split_linear(second, group, "row")])


class VocabularyEmbedding(Plain):
    """Each rank holds the rows of its part of the vocabulary; rows of others count as zero."""

    def __init__(self, weight: Array, group: Group) -> None:
        refuse_uneven(weight.shape[0], group, "rows of the vocabulary")
        super().__init__({"weight": part_of(weight, group, 0)}, {"weight": (0, group)})
        self._group = group

    def forward(self, x: Array) -> tuple[Array, Saved]:
        table = self.parameters["weight"]
        local = x - self._group.rank * table.shape[0]
        is_here = (local >= 0) & (local < table.shape[0])
        rows = table[namespace(x).where(is_here, local, 0)] * is_here[..., None]
        return all_sum(rows, self._group), local

    def backward(self, saved: Saved, dy: Array) -> tuple[Array, Gradients]:
        local = saved
        table, xp = self.parameters["weight"], namespace(dy)
        chosen = xp.reshape(local, (-1, 1)) == xp.arange(table.shape[0])
        return None, {"weight": chosen.astype(dy.dtype).T @ xp.reshape(dy, (-1, dy.shape[-1]))}
