"""Shard the parameters of a model over ranks: ZeRO 1 to 3 (Rajbhandari et al., arXiv:1910.02054) on FSDP2.

Stage 1 keeps gathered parameters and whole gradients until the step, stage 2 scatters each micro-batch's
gradients, stage 3 also frees gathered parameters after each use. Stages differ in when things are exchanged,
never in what is computed.
"""

from __future__ import annotations

from collections import Counter

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

from trainfleet.parallel.blocks import find_blocks
from trainfleet.parallel.torch_private import reduce_unused_gradients
from trainfleet.plan import Plan


def shard(model: nn.Module, mesh: DeviceMesh, plan: Plan) -> FSDPModule:
    """Shard `model` in place over `mesh` (dims dp_replicate, dp_shard), block by block.

    Left whole, because FSDP2 cannot hold them or must not cut them: scalar (0-dim) parameters. Shared by
    several blocks, and so gathered with the root: tied weights. The caller averages the gradients of whole ones.
    """
    scalars = {parameter for parameter in model.parameters() if parameter.ndim == 0}
    blocks = find_blocks(model, plan.blocks)
    tied = shared_parameters(model, blocks)
    offload = (
        CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if plan.offload == "parameters" else OffloadPolicy()
    )
    over = mesh if mesh["dp_replicate"].size() > 1 else mesh["dp_shard"]
    # Innermost first: a module takes what its children have not.
    for block in sorted(blocks, key=lambda block: sum(1 for _ in block.modules())):
        fully_shard(
            block,
            mesh=over,
            reshard_after_forward=plan.zero == 3,
            offload_policy=offload,
            ignored_params=scalars | tied,
        )
    # Backward begins with what the root gathered last, so the root keeps it in every stage.
    root = fully_shard(model, mesh=over, reshard_after_forward=False, offload_policy=offload, ignored_params=scalars)
    for entry in plan.entry_points:
        register_fsdp_forward_method(model, entry)
    reduce_unused_gradients(root)
    return root


def shared_parameters(model: nn.Module, blocks: list[nn.Module]) -> set[nn.Parameter]:
    """Parameters that a block shares with another block or with the rest of the model."""
    inside = {module for block in blocks for module in block.modules()}
    owners: Counter[nn.Parameter] = Counter()
    for block in blocks:
        owners.update(set(block.parameters()))
    for module in model.modules():
        if module not in inside:
            owners.update(set(module.parameters(recurse=False)))
    nested = {parameter for parameter in owners if owners[parameter] > 1}
    # A block inside a block counts twice without being shared: take those away that one innermost block owns alone.
    for block in blocks:
        if any(other is not block and block in set(other.modules()) for other in blocks):
            nested -= {p for p in block.parameters() if _holders(model, p) == 1}
    return nested


def _holders(model: nn.Module, parameter: nn.Parameter) -> int:
    return sum(any(held is parameter for held in module.parameters(recurse=False)) for module in model.modules())
