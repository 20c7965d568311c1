"""parallelize: spread one model over one mesh, in one visible order."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import nn

from trainfleet.comm.group import Group
from trainfleet.errors import PlanError
from trainfleet.mesh import Mesh
from trainfleet.parallel.batch_stats import sync_batch_stats
from trainfleet.parallel.blocks import find_blocks
from trainfleet.parallel.deferred import is_deferred, materialize
from trainfleet.parallel.precision import cast_compute
from trainfleet.parallel.recompute import recompute
from trainfleet.parallel.replicas import digests
from trainfleet.parallel.replicate import GradientAverage
from trainfleet.parallel.shard import shard
from trainfleet.parallel.spread import Spread, attach, is_spread, whole_parameters
from trainfleet.plan import Plan

logger = logging.getLogger(__name__)


def parallelize(model: nn.Module, mesh: Mesh, plan: Plan) -> nn.Module:
    """Spread `model` over `mesh` as `plan` says, in place; make the optimizer afterwards.

    The order matters: each step sees what the previous one made. All ranks call it with equal models;
    where their parameters differ, those of rank 0 are taken. A model built by `deferred` is filled here,
    each rank making only its own part. Raises PlanError, before anything is changed, for what cannot work.
    """
    plan = plan.for_world(mesh.world_size)
    if is_spread(model):
        raise PlanError(f"This {type(model).__name__} is spread already; build a new one for another plan.")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise PlanError(
            f"{type(model).__name__} has no parameter that requires a gradient, so there is nothing to train."
        )
    blocks = find_blocks(model, plan.blocks)
    _refuse_missing_entries(model, plan)

    if not is_deferred(model):
        model.to(mesh.device)
        take_equal_parameters(model, mesh.data_axes)
    if plan.sync_batch_stats:
        sync_batch_stats(model, mesh.data_axes)
    cast_compute(model, plan, torch.device(mesh.device).type)
    if plan.recompute == "blocks":
        recompute(model, blocks)
    if plan.compile:
        for block in blocks or [model]:
            block.compile()
    sharded = shard(model, mesh.torch, plan) if plan.zero else None
    if is_deferred(model):
        materialize(model, mesh.device)
    average = GradientAverage(whole_parameters(model), mesh.data_axes)
    attach(model, Spread(plan=plan, mesh=mesh, average=average, sharded=sharded))
    return model


def take_equal_parameters(model: nn.Module, group: Group) -> None:
    """Let all ranks begin with the same parameters and buffers: those of rank 0, should they differ."""
    if group.size == 1:
        return
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    mine = digests(tensors)
    theirs = group.exchange(mine)
    if structure := _unlike(theirs):
        raise PlanError(f"The ranks built different models: {structure} Build the same model on every rank.")
    different = [name for name in tensors if len({each[name] for each in theirs}) > 1]
    if different:
        logger.warning(
            "The ranks built models with different numbers (first in %s); all take those of rank 0. "
            "Set the same seed on every rank to save this exchange.",
            different[0],
        )
        with torch.no_grad():
            for name in different:
                group.broadcast_(tensors[name].data.contiguous() if tensors[name].ndim else tensors[name].data).wait()


def _unlike(theirs: Sequence[dict[str, str]]) -> str | None:
    for rank, names in enumerate(theirs):
        if odd := sorted(set(names) ^ set(theirs[0])):
            return f"{odd[0]} is on only one of ranks 0 and {rank}."
        for name, digest in names.items():
            if digest.split(" ")[0] != theirs[0][name].split(" ")[0]:
                return f"{name} is {theirs[0][name].split(' ')[0]} on rank 0 and {digest.split(' ')[0]} on rank {rank}."
    return None


def _refuse_missing_entries(model: nn.Module, plan: Plan) -> None:
    for entry in plan.entry_points:
        if not callable(getattr(model, entry, None)):
            raise PlanError(f"plan.entry_points names {entry!r}, but {type(model).__name__} has no such method.")
