"""Self-attention with its derivative, and Megatron's way to split it: each rank has some of the heads.

Vaswani et al., arXiv:1706.03762, equation 1; split as in Shoeybi et al., arXiv:1909.08053, figure 3b: queries, keys
and values by column, the output by row, so that one sum forward and one backward join the heads.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from trainfleet.comm.group import Group
from trainfleet.errors import PlanError
from trainfleet.mpi.arrays import Array, all_sum, namespace
from trainfleet.mpi.layers import (
    GELU,
    Gradients,
    LayerNorm,
    Linear,
    Plain,
    Residual,
    Saved,
    Sequential,
    affine,
    affine_gradients,
)
from trainfleet.mpi.linear import LinearPair, part_of, refuse_uneven

# B batch, T tokens, H heads (of this rank), D width of a head
_INPUTS = ("query", "key", "value")


class SelfAttention(Plain):
    """softmax(Q K^T / sqrt(D)) V of the heads that this rank has; causal if asked.

    Parameters `query.weight`, `query.bias` and so on, and `out.weight`, `out.bias`. Without a group it has all heads.
    """

    def __init__(
        self, parameters: dict[str, Array], num_heads: int, *, causal: bool = False, group: Group | None = None
    ) -> None:
        cut: dict[str, tuple[int, Group]] = {}
        if group is not None:
            cut = {f"{name}.{kind}": (0, group) for name in _INPUTS for kind in ("weight", "bias")}
            cut["out.weight"] = (1, group)
        super().__init__(parameters, cut)
        self.num_heads = num_heads
        self.causal = causal
        self._group = group

    @classmethod
    def random(
        cls,
        width: int,
        num_heads: int,
        generator: np.random.Generator,
        *,
        causal: bool = False,
        dtype: Any = np.float32,
    ) -> SelfAttention:
        if width % num_heads:
            raise PlanError(f"{num_heads} heads do not divide the width {width}.")
        parameters: dict[str, Array] = {}
        for name in (*_INPUTS, "out"):
            linear = Linear.random(width, width, generator, dtype)
            parameters |= {f"{name}.{kind}": value for kind, value in linear.parameters.items()}
        return cls(parameters, num_heads, causal=causal)

    def split(self, group: Group) -> SelfAttention:
        """The part of this rank, of an attention that every rank has whole."""
        refuse_uneven(self.num_heads, group, "heads")
        parts = {}
        for name, value in self.parameters.items():
            dim = 0 if name.startswith(_INPUTS) else 1
            parts[name] = value if name == "out.bias" else part_of(value, group, dim)
        return SelfAttention(parts, self.num_heads // group.size, causal=self.causal, group=group)

    def forward(self, x: Array) -> tuple[Array, Saved]:
        xp, p = namespace(x), self.parameters
        q, k, v = (self._heads(affine(x, p[f"{name}.weight"], p[f"{name}.bias"])) for name in _INPUTS)
        scores_BHTT = q @ xp.swapaxes(k, -1, -2) / math.sqrt(q.shape[-1])
        if self.causal:
            tokens = xp.arange(x.shape[-2])
            scores_BHTT = xp.where(tokens[:, None] >= tokens, scores_BHTT, -math.inf)
        exponentials = xp.exp(scores_BHTT - xp.max(scores_BHTT, axis=-1, keepdims=True))
        weights_BHTT = exponentials / xp.sum(exponentials, axis=-1, keepdims=True)
        joined = self._joined(weights_BHTT @ v)
        y = affine(joined, p["out.weight"], None)
        if self._group is not None:
            y = all_sum(y, self._group)
        return y + p["out.bias"], (x, q, k, v, weights_BHTT, joined)

    def backward(self, saved: Saved, dy: Array) -> tuple[Array, Gradients]:
        x, q, k, v, weights_BHTT, joined = saved
        xp, p = namespace(dy), self.parameters
        gradients = {f"out.{kind}": value for kind, value in affine_gradients(joined, dy, True).items()}
        dheads = self._heads(dy @ p["out.weight"])
        dweights = dheads @ xp.swapaxes(v, -1, -2)
        # through softmax: each row of the derivative loses its mean under the weights
        dscores = weights_BHTT * (dweights - xp.sum(dweights * weights_BHTT, axis=-1, keepdims=True))
        dscores = dscores / math.sqrt(q.shape[-1])
        inputs = (dscores @ k, xp.swapaxes(dscores, -1, -2) @ q, xp.swapaxes(weights_BHTT, -1, -2) @ dheads)
        dx: Array = 0
        for name, dheads in zip(_INPUTS, inputs, strict=True):
            dflat = self._joined(dheads)
            dx = dx + dflat @ p[f"{name}.weight"]
            gradients |= {f"{name}.{kind}": value for kind, value in affine_gradients(x, dflat, True).items()}
        return (all_sum(dx, self._group) if self._group is not None else dx), gradients

    def _heads(self, flat: Array) -> Array:
        xp, (batch, tokens, width) = namespace(flat), flat.shape
        return xp.transpose(xp.reshape(flat, (batch, tokens, self.num_heads, width // self.num_heads)), (0, 2, 1, 3))

    def _joined(self, heads: Array) -> Array:
        xp, (batch, count, tokens, width) = namespace(heads), heads.shape
        return xp.reshape(xp.transpose(heads, (0, 2, 1, 3)), (batch, tokens, count * width))


def transformer_block(
    width: int, num_heads: int, generator: np.random.Generator, *, causal: bool = True, dtype: Any = np.float32
) -> Sequential:
    """x + attention(norm(x)), then x + mlp(norm(x)) with a hidden width of 4 x."""
    attention = SelfAttention.random(width, num_heads, generator, causal=causal, dtype=dtype)
    up, down = (Linear.random(a, b, generator, dtype) for a, b in ((width, 4 * width), (4 * width, width)))
    return Sequential(
        {
            "attention": Residual({"norm": LayerNorm.ones(width, dtype), "heads": attention}),
            "mlp": Residual({"norm": LayerNorm.ones(width, dtype), "pair": LinearPair([up, GELU(), down])}),
        }
    )
