"""Functions on tensors in pieces, beside the same functions on the whole: values and gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from trainfleet.mesh import Mesh
from trainfleet.parallel.tensor.exchange import placed
from trainfleet.parallel.tensor.region import on_pieces
from trainfleet.plan import Plan

Calls = Mapping[str, Callable[[Tensor], Any]]


def differences(calls: Calls, placements: Sequence[Any], shape: Sequence[int]) -> list[str]:
    """On two ranks: which calls, of numbers of `shape` placed so, give something else than on the whole."""
    found = []
    for name, call in calls.items():
        expected = _compute(name, call, None, shape)
        for placement in placements:
            try:
                pairs = list(zip(expected, _compute(name, call, placement, shape), ("value", "gradient"), strict=True))
            except Exception as exc:
                found.append(f"{name}, {placement}: {exc}"[:300])
                continue
            for one, other, what in pairs:
                if one.shape != other.shape or not torch.allclose(one, other, rtol=1e-4, atol=1e-4):
                    found.append(f"{name}, {placement}: {what}")
    return found


def _compute(name: str, call: Callable[[Tensor], Any], placement: Any, shape: Sequence[int]) -> list[Tensor]:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def forward(x: Tensor) -> Tensor:
        if placement is not None:
            assert isinstance(x, DTensor)
            x = placed(x, placement)
        result: Tensor = call(x)
        return result

    torch.manual_seed(1)
    if placement is None:
        return _with_gradient(x, forward(x))
    with Mesh.from_env(Plan(tp=2)) as mesh:
        return _with_gradient(x, on_pieces(forward, name, mesh.torch["tp"])(x))


def _with_gradient(x: Tensor, y: Tensor) -> list[Tensor]:
    (y * torch.arange(y.numel()).view(y.shape).cos()).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    return [y.detach(), x.grad]
