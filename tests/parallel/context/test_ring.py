"""Ring attention gives what plain attention gives, output and gradients, however the sequence is masked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from rank_pool import RankPools
from torch import Tensor

from trainfleet.parallel.context.ring import ring_attention

B, H, T, D = 2, 6, 16, 8

CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"is_causal": True},
    "scaled": {"is_causal": True, "scale": 0.5},
    "grouped": {"is_causal": True, "groups": 2},
    "one group": {"groups": 1},
    "packed": {"mask": "documents"},
    "packed, grouped": {"mask": "documents", "groups": 3},
    "added": {"mask": "numbers"},
    "added per head": {"mask": "heads"},
    "keys": {"mask": "keys"},
    "longer keys": {"keys": 24},
    "odd pieces": {"is_causal": True, "length": 12},
    "narrower values": {"is_causal": True, "values": 4},
}


def mask_of(kind: str | None, length: int, keys: int) -> Tensor | None:
    generator = torch.Generator().manual_seed(1)
    if kind == "documents":  # each row of another packing; position 3 of the second sees nothing at all
        documents = torch.stack([torch.arange(length) // 5, torch.arange(length) // 7])
        mask = (documents[:, :, None] == documents[:, None, :]) & torch.ones(length, length).tril().bool()
        mask[1, 3] = False
        return mask[:, None]
    if kind == "keys":
        return torch.rand(B, 1, 1, keys, generator=generator) > 0.3
    if kind is None:
        return None
    return torch.randn(*((B, H) if kind == "heads" else ()), length, keys, generator=generator)


def inputs(case: dict[str, Any], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    length, groups = case.get("length", T), case.get("groups", H)
    keys = case.get("keys", length)
    shapes = [(B, H, length, D), (B, groups, keys, D), (B, groups, keys, case.get("values", D))]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def wrong(cases: dict[str, dict[str, Any]], dtype: torch.dtype, tolerance: float) -> list[str]:
    """The cases in which a tensor deviates from that of plain attention in float64."""
    group = dist.group.WORLD
    assert group is not None
    found = []
    for name, case in cases.items():
        q, k, v = (each.double().requires_grad_() for each in inputs(case, dtype))
        mask = mask_of(case.get("mask"), q.shape[-2], k.shape[-2])
        if mask is not None and mask.is_floating_point():
            mask = mask.to(dtype).double().requires_grad_()
        options = {key: case[key] for key in ("is_causal", "scale") if key in case}
        expected = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True, **options)
        weights = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).cos().view(expected.shape)
        (expected * weights).sum().backward()

        def own(x: Tensor) -> Tensor:
            return x.detach().to(dtype).chunk(group.size(), -2)[group.rank()].clone().requires_grad_()

        mine = [own(each) for each in (q, k, v)]
        rows = mask
        if mask is not None:
            rows = own(mask) if mask.is_floating_point() else mask
            if not mask.is_floating_point() and mask.shape[-2] > 1:
                rows = mask.chunk(group.size(), -2)[group.rank()]
        got = ring_attention(
            *mine, group, mask=rows, causal=options.get("is_causal", False), scale=options.get("scale")
        )
        (got * own(weights).detach()).sum().backward()
        pairs = [(got, own(expected)), *((a.grad, own(b.grad)) for a, b in zip(mine, (q, k, v)))]
        if mask is not None and mask.is_floating_point():
            pairs.append((rows.grad, own(mask.grad)))
        for i, (a, b) in enumerate(pairs):
            deviation = (a.double() - b.double()).norm() / b.double().norm()
            if not deviation <= tolerance or a.dtype != dtype:
                found.append(f"{name}, tensor {i}: {deviation}")
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_the_ring_gives_what_plain_attention_gives(ranks: RankPools, size: int) -> None:
    assert ranks(size, wrong, CASES, torch.float64, 1e-14) == [[]] * size


def test_in_float32_and_bfloat16_too_within_their_rounding(ranks: RankPools) -> None:
    assert ranks(2, wrong, CASES, torch.float32, 1e-6) == [[]] * 2
    assert ranks(2, wrong, CASES, torch.bfloat16, 1.5e-2) == [[]] * 2


@pytest.mark.matrix
def test_three_ranks_and_long_rows_too(ranks: RankPools) -> None:
    cases = {name: {**case, "length": 96, "keys": 96} for name, case in CASES.items()}
    assert ranks(3, wrong, cases, torch.float64, 1e-13) == [[]] * 3
