"""Shard the parameters of a model over ranks: ZeRO 1 to 3 (Rajbhandari et al., arXiv:1910.02054) on FSDP2.

Stage 1 keeps gathered parameters and whole gradients until the step, stage 2 scatters each micro-batch's
gradients, stage 3 also frees gathered parameters after each use. Stages differ in when things are exchanged,
never in what is computed.
"""

from __future__ import annotations

import functools
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from trainfleet.parallel.layout import is_split_over
from trainfleet.parallel.replicate import BUCKET_BYTES
from trainfleet.parallel.torch_private import exchange_within, reduce_unused_gradients
from trainfleet.plan import Plan
from trainfleet.stopwatch import timed


def units_of(model: nn.Module, blocks: Sequence[nn.Module], plan: Plan) -> Sequence[nn.Module]:
    """Those of `blocks` whose parameters travel on their own; the rest of the model travels together.

    Where parameters stay gathered, units only let the exchange of one overlap the backward of the next. A model that
    would fit into one bucket of replicated gradients is one unit: it spares steps of 0.2 s a twentieth, and for a
    moment of backward its gradients lie there whole. Blocks that the plan names are units always.
    """
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return blocks if plan.zero == 3 or plan.blocks or size > BUCKET_BYTES else ()


def shard(model: nn.Module, units: Sequence[nn.Module], mesh: DeviceMesh, plan: Plan) -> FSDPModule:
    """Shard `model` in place over `mesh` (its dims dp_replicate, dp_shard): each of `units`, and the rest as another.

    What FSDP2 cannot hold stays whole on every rank, and the caller averages its gradients: see
    `unshardable_parameters`; and what only units share with one another.
    """
    odd = unshardable_parameters(model) | {p for p in model.parameters() if is_split_over(p, "ep")}
    tied = shared_parameters(model, units)
    offload = (
        CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if plan.offload == "parameters" else OffloadPolicy()
    )
    of_data = mesh if mesh.ndim == 2 else mesh["dp_replicate", "dp_shard"]
    over = of_data if mesh["dp_replicate"].size() > 1 else mesh["dp_shard"]
    for parameter in model.parameters():
        if not parameter.is_contiguous():  # of a convolution with channels last, which only whole parameters can have
            parameter.data = parameter.data.contiguous()
    # Innermost first: a module takes what its children have not. What a unit shares with the rest of the model
    # is left to the root, which finds it inside the unit too.
    for unit in sorted(units, key=lambda unit: sum(1 for _ in unit.modules())):
        fully_shard(
            unit,
            mesh=over,
            reshard_after_forward=plan.zero == 3,
            offload_policy=offload,
            ignored_params=odd | tied,
        )
    # Backward begins with what the root gathered last, so the root keeps it in every stage.
    root = fully_shard(model, mesh=over, reshard_after_forward=False, offload_policy=offload, ignored_params=odd)
    if units:
        # Only an in-place change of the model's output could lose a hook, and the units' hooks do what it would.
        warnings.filterwarnings("ignore", rf"FSDP2-wrapped module \({type(model).__name__}\) returned a view")
    for entry in plan.entry_points:
        register_fsdp_forward_method(model, entry)
    reduce_unused_gradients(root)
    exchange_within(root, functools.partial(timed, "communication"))
    return root


def unshardable_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Parameters that FSDP2 refuses: scalars; and trainable ones that are empty, complex, or not of the usual dtype."""
    numbers: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        if parameter.requires_grad:
            numbers[parameter.dtype] += parameter.numel()
    usual = max(numbers, key=lambda dtype: (not dtype.is_complex, numbers[dtype]))
    return {
        parameter
        for parameter in model.parameters()
        if parameter.ndim == 0
        or (parameter.requires_grad and (parameter.dtype != usual or parameter.is_complex() or not parameter.numel()))
    }


def shared_parameters(model: nn.Module, units: Sequence[nn.Module]) -> set[nn.Parameter]:
    """Parameters that belong to several of `units`, each without the units inside it, and the rest of the model."""
    set_of_units, owners = set(units), defaultdict[nn.Parameter, set[nn.Module]](set)
    seen: set[tuple[nn.Module, nn.Module]] = set()

    def walk(module: nn.Module, unit: nn.Module) -> None:
        unit = module if module in set_of_units else unit
        if (module, unit) in seen:
            return
        seen.add((module, unit))
        for parameter in module.parameters(recurse=False):
            owners[parameter].add(unit)
        for child in module.children():
            walk(child, unit)

    walk(model, model)
    return {parameter for parameter, found in owners.items() if len(found) > 1}
