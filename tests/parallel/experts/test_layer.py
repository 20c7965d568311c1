"""MixtureOfExperts gives what its formula says: the chosen experts, weighed; capacity; the balance of the work."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainfleet.parallel.experts.layer import Experts, MixtureOfExperts, balance_loss


def by_hand(layer: MixtureOfExperts, x: Tensor) -> Tensor:
    """Token by token, choices in rounds, each expert with so much room."""
    tokens = x.reshape(-1, x.shape[-1])
    number = layer.experts.num_experts
    room = [float("inf")] * number
    if layer.capacity_factor is not None:
        room = [-(-layer.capacity_factor * len(tokens) * layer.top_k // number)] * number
    weights, chosen = F.linear(tokens, layer.router.weight).softmax(-1).topk(layer.top_k)
    weights = weights / weights.sum(-1, keepdim=True)
    rows = [torch.zeros_like(token) for token in tokens]
    for choice in range(layer.top_k):
        for n, token in enumerate(tokens):
            expert = int(chosen[n, choice])
            if room[expert] > 0:
                room[expert] -= 1
                gate, up = (layer.experts.gate_up_proj[expert] @ token).chunk(2)
                rows[n] = rows[n] + weights[n, choice] * (layer.experts.down_proj[expert] @ (F.silu(gate) * up))
    return torch.stack(rows).view(x.shape)


@pytest.mark.parametrize("capacity_factor", [None, 1.0, 0.4])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_the_layer_gives_what_the_formula_says(top_k: int, capacity_factor: float | None) -> None:
    torch.manual_seed(0)
    layer = MixtureOfExperts(6, 5, 4, top_k=top_k, capacity_factor=capacity_factor).double()
    x = torch.randn(3, 7, 6, dtype=torch.float64, requires_grad=True)
    found, expected = layer(x), by_hand(layer, x)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)  # the router's softmax is float32
    leaves = [x, *layer.parameters()]
    weights = torch.randn_like(found)
    for one, other in zip(
        torch.autograd.grad((found * weights).sum(), leaves, retain_graph=True),
        torch.autograd.grad((expected * weights).sum(), leaves),
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert layer.num_dropped is not None
    assert (int(layer.num_dropped) > 0) == (capacity_factor is not None and not (top_k == 4 and capacity_factor == 1))


def test_the_balance_loss_is_one_where_all_experts_have_the_same_work_and_falls_by_its_gradient() -> None:
    torch.manual_seed(0)
    layer = MixtureOfExperts(4, 3, 4, top_k=1)
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(4) * 9)
    layer(torch.eye(4))
    assert balance_loss(layer).item() == pytest.approx(1.0, abs=1e-6)
    layer(torch.eye(4)[:1].expand(4, 4))  # all to one
    first = balance_loss(layer)
    assert first.item() > 3.9
    first.backward()
    with torch.no_grad():
        layer.router.weight -= 5 * layer.router.weight.grad
    layer(torch.eye(4)[:1].expand(4, 4))
    assert balance_loss(layer).item() < first.item()


def test_wrong_numbers_are_refused_and_no_mixture_has_no_balance() -> None:
    with pytest.raises(ValueError, match="top_k is 5; use 1 to num_experts = 4"):
        MixtureOfExperts(4, 4, 4, top_k=5)
    with pytest.raises(ValueError, match="capacity_factor is 0"):
        MixtureOfExperts(4, 4, 4, capacity_factor=0)
    with pytest.raises(ValueError, match="no balance loss"):
        balance_loss(Experts(2, 2, 2))
