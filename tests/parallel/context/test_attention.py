"""Attention of pieces gives what that of the whole gives, whatever its arguments; some of it is computed whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rank_pool import RankPools
from torch import Tensor

from trainfleet.mesh import Mesh
from trainfleet.parallel.context import attention
from trainfleet.parallel.context.region import Context
from trainfleet.plan import Plan

B, H, T, D = 2, 4, 8, 6

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True, "scale": 0.3},
    "grouped": {"groups": 2, "enable_gqa": True, "is_causal": True},
    "masked": {"mask": torch.rand(B, 1, T, T, generator=torch.Generator().manual_seed(2)) > 0.4},
    "masked by head": {"mask": torch.randn(H, T, T, generator=torch.Generator().manual_seed(2))},
    "masked by key": {"mask": (torch.arange(T) < 6)[None]},
    "longer keys": {"keys": 12},
    "computed whole: dropout": {"dropout_p": 0.4, "whole": True},
    "computed whole: odd keys": {"keys": 7, "whole": True},
    "computed whole: causal, longer keys": {"keys": 12, "is_causal": True, "whole": True},
    "computed whole: one key of a batch for all": {"batch": 1, "whole": True},
}


def inputs(case: dict[str, Any]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    keys = (case.get("batch", B), case.get("keys", T), case.get("groups", H), D)
    shapes = [(B, T, H, D), keys, keys]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def computed(case: dict[str, Any], context: Context | None) -> list[Tensor]:
    options = {key: case[key] for key in ("is_causal", "scale", "enable_gqa", "dropout_p") if key in case}
    arrays = inputs(case)
    mask = case.get("mask")
    if mask is not None and mask.is_floating_point():
        mask = mask.clone().requires_grad_()
        arrays.append(mask)
    torch.manual_seed(0)

    def compute(batch: list[Tensor]) -> Tensor:
        q, k, v = (each.transpose(1, 2) for each in batch)
        y = F.scaled_dot_product_attention(q, k, v, mask, **options)
        return (y * torch.linspace(-2, 2, y.numel()).cos().view(y.shape)).sum()

    loss = compute(arrays[:3]) if context is None else context.run(compute, arrays[:3])
    loss.backward()
    gradients = [each.grad for each in arrays]
    if context is not None:
        for gradient in gradients:
            torch.distributed.all_reduce(gradient)
            gradient /= context.mesh.size()
    return [loss.detach(), *gradients]


def wrong(kind: Any) -> list[str]:
    found = []
    ring, heads = attention.ring_attention, attention.traded
    with Mesh.from_env(Plan(cp=2)) as mesh:
        context = Context(mesh.torch["cp"], kind)
        for name, case in CASES.items():
            calls: list[int] = []

            def counted(
                *args: Any, call: Any = ring if kind == "ring" else heads, calls: Any = calls, **more: Any
            ) -> Any:
                calls.append(1)
                return call(*args, **more)

            setattr(attention, "ring_attention" if kind == "ring" else "traded", counted)
            for one, other in zip(computed(case, None), computed(case, context), strict=True):
                if not torch.allclose(one, other, rtol=1e-4, atol=1e-5):
                    found.append(name)
            if bool(calls) == case.get("whole", False):
                found.append(f"{name}: computed {'whole' if not calls else 'on pieces'}")
    attention.ring_attention, attention.traded = ring, heads
    return found


@pytest.mark.parametrize("kind", ["ring", "all_to_all"])
def test_attention_on_pieces_gives_what_the_whole_gives(ranks: RankPools, kind: str) -> None:
    assert ranks(2, wrong, kind) == [[], []]
