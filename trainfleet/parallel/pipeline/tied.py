"""Tied parameters: of one that several ranks of a pipeline hold, each has its own stages' part of the gradient."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainfleet.comm.group import Links
from trainfleet.errors import PlanError
from trainfleet.parallel.layout import piece_of
from trainfleet.parallel.pipeline.pipe import Pipeline
from trainfleet.parallel.torch_private import with_local


def sum_tied_gradients(pipeline: Pipeline, model: nn.Module) -> None:
    """Give each holder of a tied parameter the sum of all holders' gradients, the same to the bit on each.

    Two holders are the rule (an embedding and the head), so each sends its part to every other.
    """
    links, own = cast(Links, pipeline.group), pipeline.group.rank
    ours = dict(model.named_parameters())
    tied = [(name, pipeline.holders(name)) for name in pipeline.tied() if own in pipeline.holders(name)]
    tied = [(name, holders) for name, holders in tied if ours[name].requires_grad]
    messages = {name: _as_message(ours[name]) for name, _ in tied}
    works = []
    received: dict[tuple[str, int], Tensor] = {(name, own): message for name, message in messages.items()}
    for name, holders in tied:
        for peer in holders:
            if peer != own:
                received[name, peer] = torch.empty_like(messages[name])
                works.append(links.send(messages[name], peer))
                works.append(links.recv_(received[name, peer], peer))
    for work in works:
        work.wait()
    for name, holders in tied:
        parts = [received[name, holder] for holder in holders]
        _take_sum(ours[name], parts)


def _as_message(parameter: nn.Parameter) -> Tensor:
    """[whether there is a gradient, its elements]"""
    local = piece_of(parameter)
    message = torch.zeros(local.numel() + 1, dtype=local.dtype, device=local.device)
    if parameter.grad is not None:
        message[0] = 1
        message[1:] = piece_of(parameter.grad).reshape(-1)
    return message


def _take_sum(parameter: nn.Parameter, parts: list[Tensor]) -> None:
    present = [part[1:] for part in parts if bool(part[0] != 0)]
    if not present:
        parameter.grad = None
        return
    total = present[0].clone()
    for part in present[1:]:
        total += part
    local = total.view_as(piece_of(parameter))
    parameter.grad = with_local(parameter, local) if isinstance(parameter, DTensor) else local


def refuse_unlike_holders(pipeline: Pipeline, model: nn.Module) -> None:
    """PlanError, on all ranks, where the holders of a tied parameter split it in different ways."""
    ours = {name: _layout(p) for name, p in model.named_parameters() if name in pipeline.tied()}
    theirs = pipeline.group.exchange(ours)
    for name in pipeline.tied():
        layouts = {each[name] for each in theirs if name in each}
        if len(layouts) > 1:
            raise PlanError(
                f"{name} is tied between stages of the pipeline that lay it out differently: "
                f"{' and '.join(sorted(layouts))}. Name the modules that share it in plan.tp_whole, or let one stage "
                "hold them (plan.stages)."
            )


def _layout(parameter: nn.Parameter) -> str:
    local = piece_of(parameter)
    placements = str(parameter.placements) if isinstance(parameter, DTensor) else "whole"
    return f"{placements} {list(local.shape)}"
