"""Muon on shards: orthogonalise the whole matrix, keep the piece."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from trainfleet.parallel.cut import piece_like
from trainfleet.parallel.torch_private import adjusted_muon_rate, orthogonalise


class GatheredMuon(torch.optim.Muon):
    """torch's Muon with each sharded update gathered, orthogonalised as one matrix on every rank, and cut again.

    Momentum and weight decay are by element, so they stay on the shards. A step costs one all-gather of the
    gradient's size more than on whole parameters, and the memory of one whole matrix.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            rate = float(group["lr"])
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter.grad)
                momentum = state["momentum_buffer"]
                momentum.lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
                whole = update.full_tensor() if isinstance(update, DTensor) else update
                update = orthogonalise(whole, group["ns_coefficients"], group["ns_steps"], group["eps"])
                adjusted = adjusted_muon_rate(rate, group["adjust_lr_fn"], parameter.shape)
                local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                local.mul_(1 - rate * group["weight_decay"]).add_(piece_like(update, parameter), alpha=-adjusted)
        return loss
