"""The plain thing that spread models are held against: one process, torch, a loop written by hand."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from models import MODELS
from torch import Tensor, nn

from trainfleet.batch import call_with_batch
from trainfleet.loss import LossSum
from trainfleet.mesh import Mesh
from trainfleet.plan import Plan
from trainfleet.training.proof.case import Case
from trainfleet.training.proof.trace import trace
from trainfleet.training.proof.verdict import Trace, compare, joined

if TYPE_CHECKING:
    from rank_pool import RankPools


def case_of_model(name: str, **options: Any) -> Case:
    """The small model `name` with its data and AdamW; its parts can be sent to other processes."""
    return Case(
        build=functools.partial(_build, name),
        loss_fn=MODELS[name].loss_fn,
        micro_batch=functools.partial(_micro_batch, name),
        optimizer=adamw,
        **options,
    )


def _build(name: str) -> nn.Module:
    return MODELS[name].build(0)


def _micro_batch(name: str, number: int) -> Any:
    return MODELS[name].micro_batch(0, number)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=5e-3)


def plain_trace(case: Case, ranks: int) -> Trace:
    """What one process computes on the micro-batches of all ranks: names as those of `trace`."""
    torch.manual_seed(case.seed)
    model = case.build().train()
    optimizer = case.optimizer(model)
    found: Trace = {}
    for step in range(case.steps):
        losses = []
        for number in range(step * ranks * case.accumulation, (step + 1) * ranks * case.accumulation):
            batch = case.micro_batch(number)
            losses.append(LossSum.of(case.loss_fn(call_with_batch(model, batch), batch)))
        mean = sum(loss.total for loss in losses) / sum(loss.weight for loss in losses)
        optimizer.zero_grad()
        mean.backward()
        found[f"step {step + 1}, loss"] = mean.detach().numpy()
        if case.keep_gradients:
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    found[f"step {step + 1}, gradient of {name}"] = parameter.grad.numpy().copy()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        found[f"step {step + 1}, gradient norm"] = norm.numpy()
        if case.clip_norm is not None and norm > case.clip_norm:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(case.clip_norm / norm)
        optimizer.step()
        if not case.only_last or step == case.steps - 1:
            for name, tensor in named(model):
                wide = tensor.float() if tensor.dtype == torch.bfloat16 else tensor  # NumPy has no bfloat16
                found[f"step {step + 1}, {name}"] = wide.detach().numpy().copy()
    return found


def named(model: nn.Module) -> list[tuple[str, Tensor]]:
    parameters = [(f"parameter {name}", parameter) for name, parameter in model.named_parameters()]
    return [*parameters, *((f"buffer {name}", buffer) for name, buffer in model.named_buffers())]


def traces(case: Case, plans: Sequence[Plan]) -> list[Trace]:
    """On the ranks: what each plan computes; nothing from ranks that have the same as another one."""
    found = []
    for plan in plans:
        with Mesh.from_env(plan) as mesh:
            each = trace(case, plan, mesh)
            is_first = all(mesh[axis].rank == 0 for axis in mesh.plan_axes if axis != "pp")
            found.append(each if is_first else {})
    return found


def hold(ranks: RankPools, size: int, case: Case, plans: Sequence[Plan], *, slack: float = 1.0) -> None:
    """Every plan, on `size` ranks, computes what one process computes, within the rounding of float32."""
    expected = {number: plain_trace(case, number) for number in {plan.data_ranks(size) for plan in plans}}
    for plan, *parts in zip(plans, *ranks(size, traces, case, plans), strict=True):
        verdict = compare(expected[plan.data_ranks(size)], joined(parts), "fp32", slack=slack)
        assert verdict.holds, f"{plan}: {verdict}"


def whole(tensor: Any) -> Tensor:
    """A copy of all of a tensor, gathered where it is in pieces."""
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().clone()
