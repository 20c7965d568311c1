"""split_context: let a model compute with its sequences in pieces over context- or tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from trainfleet.errors import PlanError
from trainfleet.mesh import Mesh
from trainfleet.parallel.context.region import Context
from trainfleet.parallel.context.sequence import SWITCH_OFF
from trainfleet.parallel.recompute import stop_caching
from trainfleet.plan import Plan


def split_context(
    model: nn.Module, blocks: Sequence[nn.Module], mesh: Mesh, plan: Plan, *, whole: nn.Module | None = None
) -> Context:
    """Let `model` split sequences over the axis cp of `mesh`, in place; `blocks` are what may be recomputed.

    With plan.tp_sequence, over the axis tp, between the layers that are split over it.

    `whole` is the model of which `model` holds but some stages; a pipeline splits sequences where it trains, by itself.
    Raises PlanError before anything is changed where that cannot be.
    """
    axis = "cp" if plan.cp > 1 else "tp"
    for name, module in (whole or model).named_modules():
        if isinstance(module, _BatchNorm) and plan.sync_batch_stats:
            raise PlanError(
                f"plan.{axis} is {getattr(plan, axis)}, and {name} is a {type(module).__name__}, whose statistics are "
                "those of all positions; they are not synchronised over pieces of sequences. Use another norm, or set "
                f"{SWITCH_OFF[axis]}."
            )
    if axis == "tp":
        # Blocks that are computed again forget what they got in the meantime.
        context = Context(mesh.sharding["tp"], keep_over=mesh["tp"] if plan.recompute == "none" else None)
    else:
        with_tensor = mesh.torch["cp", "tp"] if plan.tp > 1 else None
        context = Context(mesh.torch["cp"], plan.cp_attention, with_tensor=with_tensor, keeps_logits=plan.tp_vocabulary)
    stop_caching(model)
    if plan.recompute != "none":
        for block in blocks:
            block.forward = context.reentering(block.forward)  # type: ignore[method-assign]
    if whole is None:
        context.on_calls(model)
    return context
