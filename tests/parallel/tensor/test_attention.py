"""Attention by heads is attention, for any mask, grouped heads and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rank_pool import RankPools
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from trainfleet.mesh import Mesh
from trainfleet.parallel.tensor.region import on_pieces
from trainfleet.plan import Plan

CASES: dict[str, tuple[int, int, tuple[int, ...] | None, dict[str, Any]]] = {
    "causal": (4, 4, None, {"is_causal": True}),
    "grouped": (4, 2, None, {"enable_gqa": True}),
    "one head of keys": (4, 1, None, {"enable_gqa": True}),
    "odd heads": (3, 3, None, {}),
    "mask for all": (4, 4, (6, 6), {}),
    "mask for a batch": (4, 4, (2, 1, 6, 6), {"scale": 0.3}),
    "mask by head": (4, 4, (2, 4, 6, 6), {}),
    "dropout": (4, 4, None, {"dropout_p": 0.4}),
}


def compute(name: str, tp: int) -> tuple[list[Tensor], str]:
    heads, key_heads, mask_shape, options = CASES[name]
    draw = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, n, 6, 8, generator=draw).requires_grad_() for n in (heads, key_heads, key_heads)]
    mask = None if mask_shape is None else torch.randn(mask_shape, generator=draw).requires_grad_()
    placements = ""

    def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        nonlocal placements
        y = F.scaled_dot_product_attention(q, k, v, mask, **options)
        placements = str(y.placements) if isinstance(y, DTensor) else ""
        return y

    torch.manual_seed(3)
    with Mesh.from_env(Plan(tp=tp)) as mesh:
        run = on_pieces(forward, "attention", mesh.torch["tp"]) if tp > 1 else forward
        y = run(*inputs, mask)
        (y * torch.arange(y.numel()).view(y.shape).cos()).sum().backward()
    return [y.detach(), *(each.grad for each in [*inputs, mask] if each is not None)], placements


@pytest.mark.parametrize("name", CASES)
def test_heads_dealt_out_give_what_all_heads_give(ranks: RankPools, name: str) -> None:
    expected, _ = ranks(1, compute, name, 1)[0]
    for found, placements in ranks(2, compute, name, 2):
        for one, other in zip(expected, found, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)
        whole = name in ("odd heads", "one head of keys", "dropout")
        assert placements == str((Replicate(),) if whole else (Shard(1),))
