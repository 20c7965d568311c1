"""parallelize: spread one model over one mesh, in one visible order."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from trainfleet.batch import Batch
from trainfleet.comm.group import Group
from trainfleet.errors import PlanError
from trainfleet.mesh import Mesh
from trainfleet.parallel.activations import offload_activations
from trainfleet.parallel.batch_stats import sync_batch_stats
from trainfleet.parallel.blocks import find_blocks
from trainfleet.parallel.budget import Budget
from trainfleet.parallel.context import Context, split_context
from trainfleet.parallel.deepspeed.choice import at_hand
from trainfleet.parallel.deferred import is_deferred, materialize, starts
from trainfleet.parallel.experts import split_experts
from trainfleet.parallel.partition import partition_inputs
from trainfleet.parallel.pipeline import Pipeline, deal_out, split_stages
from trainfleet.parallel.pipeline.tied import refuse_unlike_holders
from trainfleet.parallel.place import place
from trainfleet.parallel.precision import cast_compute, refuse_narrow_parameters
from trainfleet.parallel.recast import recast
from trainfleet.parallel.recompute import PRODUCTS, recompute, refuse_no_blocks, stop_caching
from trainfleet.parallel.replicas import digests
from trainfleet.parallel.replicate import GradientAverage, refuse_sparse_gradients
from trainfleet.parallel.shard import shard, units_of
from trainfleet.parallel.spread import Spread, attach, is_spread, whole_parameters
from trainfleet.parallel.tensor import Split, split_model
from trainfleet.parallel.tensor.apply import settle_gradients
from trainfleet.plan import Plan

logger = logging.getLogger(__name__)


def parallelize(model: nn.Module, mesh: Mesh, plan: Plan, *, example: Batch | None = None) -> nn.Module:
    """Spread `model` over `mesh` as `plan` says, in place; make the optimizer afterwards.

    `example` is a micro-batch, which a pipeline (plan.pp) needs to see what its stages hand on.

    The order matters: each step sees what the previous one made. All ranks call it with equal models;
    where their parameters differ, those of rank 0 are taken. A model built by `deferred` is filled here,
    each rank making only its own part. What requires a gradient is decided before.
    Raises PlanError for what cannot work; the model has then at most been moved to the device.
    """
    plan = at_hand(plan.for_world(mesh.world_size), mesh.world)
    blocks = find_blocks(model, plan.blocks)
    _refuse(model, blocks, mesh, plan)

    if not is_deferred(model) and not plan.devices:
        model.to(mesh.device)
    take_equal_parameters(model, mesh.world)
    pipeline, split, context = _deal_out(model, blocks, mesh, plan, example)
    held = set(model.modules())
    blocks = [block for block in blocks if block in held]
    budget = _prepare_computation(model, blocks, mesh, plan)
    sharded, average = _spread_over_data(model, blocks, mesh, plan)
    spread = Spread(
        plan=plan,
        mesh=mesh,
        average=average,
        sharded=sharded,
        split=split,
        context=context,
        pipeline=pipeline,
        budget=budget,
    )
    attach(model, spread)
    if pipeline is not None:
        refuse_unlike_holders(pipeline, model)
    return model


def _deal_out(
    model: nn.Module, blocks: Sequence[nn.Module], mesh: Mesh, plan: Plan, example: Batch | None
) -> tuple[Pipeline | None, Split | None, Context | None]:
    """One copy of the model over the ranks that compute it together: stages, layers, experts, sequences."""
    pipeline = deal_out(model, blocks, mesh, plan, example) if plan.pp > 1 else None
    split = None
    if plan.tp > 1:
        split = split_stages(pipeline, mesh, plan) if pipeline else split_model(model, mesh.sharding["tp"], plan)
    whole = pipeline.shadow.model if pipeline else None
    if mesh.experts is not None:
        split_experts(model, mesh.experts, whole=whole)
    context = split_context(model, blocks, mesh, plan, whole=whole) if plan.cp > 1 or plan.tp_sequence else None
    return pipeline, split, context


def _prepare_computation(model: nn.Module, blocks: Sequence[nn.Module], mesh: Mesh, plan: Plan) -> Budget | None:
    """How this rank computes its part: in which precision, what it keeps for backward and where, compiled or not."""
    if plan.sync_batch_stats:
        sync_batch_stats(model, mesh.data_axes)
    device_type = torch.device(mesh.device).type
    if plan.zero == 3 and plan.precision != "fp32" and plan.recompute == "none" and not plan.compile:
        recast(model, device_type)
    forward = model.forward
    cast_compute(model, plan, device_type)
    if plan.pp > 1:
        model.forward = forward  # type: ignore[method-assign]  # it casts as the whole model's would
    budget = None
    if plan.recompute != "none":
        keep = (plan.recompute_keep or PRODUCTS) if plan.recompute == "selective" else ()
        stop_caching(model)
        budget = Budget(model, plan.recompute_budget) if plan.recompute_budget is not None else None
        recompute(blocks[:: plan.recompute_every], keep, budget)
    if plan.activations == "offload":
        offload_activations(blocks, mesh.device)
    elif plan.activations == "partition":
        partition_inputs(blocks, mesh["tp"])
    if plan.devices:
        place(model, blocks, plan.devices, plan.entry_points)
    if plan.compile:
        for block in blocks or [model]:
            block.compile()
    return budget


def _spread_over_data(
    model: nn.Module, blocks: Sequence[nn.Module], mesh: Mesh, plan: Plan
) -> tuple[FSDPModule | None, GradientAverage]:
    """This rank's part over the ranks that see different data: sharded, or whole and averaged."""
    is_native = plan.engine == "native"  # DeepSpeed shards and averages by itself
    sharded = shard(model, units_of(model, blocks, plan), mesh.sharding, plan) if plan.zero and is_native else None
    if is_deferred(model):
        materialize(model, mesh.device, shards_on="cpu" if is_native and plan.offload == "parameters" else None)
    if plan.tp > 1:
        settle_gradients(model)
    average = GradientAverage(
        whole_parameters(model) if is_native else [],
        mesh.gradient_axes,
        overlap=sharded is None and mesh.experts is None,
        expert_group=mesh["ep_replicate"] if mesh.experts is not None else None,
    )
    return sharded, average


def take_equal_parameters(model: nn.Module, group: Group) -> None:
    """Let all ranks begin with the same parameters and buffers: those of rank 0, should they differ.

    Raises PlanError on all ranks where they are not even alike: in names, shapes, dtypes, what is trained, or the
    random numbers that a deferred model waits for.
    """
    if group.size == 1:
        return
    tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    kinds = {name: _kind(tensor) for name, tensor in tensors.items()}
    seeds = digests({str(i): start for i, start in enumerate(starts(model))})
    theirs = group.exchange({"kinds": kinds, "digests": digests(tensors), "seeds": seeds})
    for rank, each in enumerate(theirs):
        if reason := _unlike(theirs[0], each, rank):
            raise PlanError(reason)
    different = [name for name in sorted(tensors) if len({each["digests"][name] for each in theirs}) > 1]
    if different and group.rank == 0:
        logger.warning(
            "The ranks built models with different numbers (first in %s); all take those of rank 0. "
            "Set the same seed on every rank to save this exchange.",
            different[0],
        )
    for name in different:
        value = tensors[name].detach()
        # As bytes, which every backend can send.
        contiguous = value.contiguous()
        group.broadcast_(contiguous.reshape(-1).view(torch.uint8)).wait()
        if contiguous is not value:
            value.copy_(contiguous)


def _kind(tensor: Tensor) -> str:
    state = "trained " if tensor.requires_grad else "fixed " if isinstance(tensor, nn.Parameter) else ""
    return f"{state}{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _unlike(first: dict[str, Any], other: dict[str, Any], rank: int) -> str | None:
    """Why the models of rank 0 and `rank` cannot become one; None if they can."""
    ours, theirs = first["kinds"], other["kinds"]
    if odd := sorted(set(ours) ^ set(theirs)):
        reason = f"{odd[0]} is on only one of ranks 0 and {rank}."
    elif odd := sorted(name for name in ours if ours[name] != theirs[name]):
        reason = f"{odd[0]} is {ours[odd[0]]} on rank 0 and {theirs[odd[0]]} on rank {rank}."
    elif first["seeds"] != other["seeds"]:
        return (
            f"Ranks 0 and {rank} would fill the deferred model from different random numbers. "
            "Call torch.manual_seed with the same seed on every rank before `deferred`."
        )
    else:
        return None
    return f"The ranks built different models: {reason} Build the same model on every rank."


def _refuse(model: nn.Module, blocks: Sequence[nn.Module], mesh: Mesh, plan: Plan) -> None:
    name = type(model).__name__
    if is_spread(model):
        raise PlanError(f"This {name} is spread already; build a new one for another plan.")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise PlanError(f"{name} has no parameter that requires a gradient, so there is nothing to train.")
    wanted = {"dp_replicate": plan.dp_replicate, "dp_shard": plan.dp_shard, "tp": plan.tp, "cp": plan.cp, "pp": plan.pp}
    wanted["ep"], made_axes = plan.ep, {**mesh.plan_axes, "ep": mesh["ep"].size if mesh.experts is not None else 1}
    if unlike := [axis for axis, degree in wanted.items() if made_axes.get(axis, 1) != degree]:
        made = made_axes.get(unlike[0], 1)
        raise PlanError(
            f"The plan wants {unlike[0]}={wanted[unlike[0]]}, but the mesh was made with {made}. "
            "Make both from one plan: Mesh.from_env(plan)."
        )
    for entry in plan.entry_points:
        if not callable(getattr(model, entry, None)):
            raise PlanError(f"plan.entry_points names {entry!r}, but {name} has no such method.")
    refuse_narrow_parameters(model)
    if plan.devices and is_deferred(model):
        raise PlanError(f"plan.devices is set, but {name} is deferred. Build it plain: leave model.deferred out.")
    if plan.recompute != "none" or plan.activations != "keep":
        refuse_no_blocks(model, blocks)
    if plan.zero or mesh.world_size > 1:
        refuse_sparse_gradients(model)
