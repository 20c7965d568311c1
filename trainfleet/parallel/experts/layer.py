"""MixtureOfExperts: each token goes to a few of many perceptrons, chosen by a router that learns.

Legend: N tokens, C width, E experts, K experts a token goes to, F width inside an expert.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MixtureOfExperts(nn.Module):
    """[..., C] to [..., C]: each token through its `top_k` likeliest experts, weighed by their probabilities.

    With `capacity_factor` no expert takes more than capacity_factor x N x K / E tokens of a micro-batch (of one call,
    to be exact): first choices go first, then in the order of the tokens; what is dropped adds nothing (GShard,
    Lepikhin et al., arXiv:2006.16668). It does not depend on the number of ranks. None drops nothing.

    After a call `balance_loss` is a scalar that is 1 where all experts have the same work, and more elsewhere (Switch
    Transformer, Fedus et al., arXiv:2101.03961, equation 4). Add it to the loss with a small factor, as
    `balance_loss(model)` does for all layers together.
    """

    def __init__(
        self, width: int, inner: int, num_experts: int, *, top_k: int = 2, capacity_factor: float | None = None
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k is {top_k}; use 1 to num_experts = {num_experts}.")
        if capacity_factor is not None and capacity_factor <= 0:
            raise ValueError(f"capacity_factor is {capacity_factor}; use a positive number, or None to drop nothing.")
        self.top_k, self.capacity_factor = top_k, capacity_factor
        self.router = nn.Linear(width, num_experts, bias=False)
        self.experts = Experts(width, inner, num_experts)
        self.balance_loss: Tensor | None = None
        """Of the last call, with its graph."""
        self.num_dropped: Tensor | None = None
        """Choices of the last call that found their expert full, int64."""

    def forward(self, x: Tensor) -> Tensor:
        x_NC = x.reshape(-1, x.shape[-1])
        probabilities_NE = self.router(x_NC).float().softmax(-1)
        weights_NK, chosen_NK = probabilities_NE.topk(self.top_k)
        weights_NK = weights_NK / weights_NK.sum(-1, keepdim=True)
        num_experts = self.router.out_features
        load_E = F.one_hot(chosen_NK, num_experts).float().mean((0, 1))
        self.balance_loss = num_experts * (load_E * probabilities_NE.mean(0)).sum()
        if self.capacity_factor is not None:
            capacity = max(1, math.ceil(self.capacity_factor * x_NC.shape[0] * self.top_k / num_experts))
            chosen_NK = _within_capacity(chosen_NK, num_experts, capacity)
        self.num_dropped = (chosen_NK == num_experts).sum()
        mixed: Tensor = self.experts(x_NC, chosen_NK, weights_NK)
        return mixed.view(x.shape)


class Experts(nn.Module):
    """E perceptrons with gates (SwiGLU, Shazeer, arXiv:2002.05202), their matrices stacked."""

    def __init__(self, width: int, inner: int, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * inner, width))
        self.down_proj = nn.Parameter(torch.empty(num_experts, width, inner))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5 / math.sqrt(parameter.shape[-1]))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[N, C] to [N, C]; `top_k_index` [N, K] names the experts (E: none), `top_k_weights` [N, K] weighs them."""
        chosen = top_k_index.reshape(-1)
        order = chosen.argsort(stable=True)
        counts = chosen.bincount(minlength=self.num_experts + 1).tolist()
        result = torch.zeros_like(hidden_states)
        for expert, places in enumerate(torch.split(order, counts)[: self.num_experts]):
            if not len(places):
                continue
            rows = places // top_k_index.shape[1]
            gate, up = F.linear(hidden_states[rows], self.gate_up_proj[expert]).chunk(2, -1)
            y = F.linear(F.silu(gate) * up, self.down_proj[expert])
            y = y * top_k_weights.reshape(-1)[places, None]
            result = result.index_add(0, rows, y.to(result.dtype))
        return result


def balance_loss(model: nn.Module) -> Tensor:
    """The mean of `balance_loss` over the mixtures that `model` has called; ValueError where there is none."""
    found = [module.balance_loss for module in model.modules() if isinstance(module, MixtureOfExperts)]
    losses = [loss for loss in found if loss is not None]
    if not losses:
        raise ValueError(f"{type(model).__name__} has called no MixtureOfExperts, so there is no balance loss.")
    return torch.stack(losses).mean()


def _within_capacity(chosen_NK: Tensor, num_experts: int, capacity: int) -> Tensor:
    """`chosen_NK` with `num_experts`, which is none of them, where an expert is full."""
    by_choice = chosen_NK.T.reshape(-1)  # all first choices, then all second ones
    place = F.one_hot(by_choice, num_experts).cumsum(0).gather(1, by_choice[:, None]).squeeze(1)
    kept = by_choice.where(place <= capacity, num_experts)
    return kept.view(chosen_NK.shape[1], -1).T
