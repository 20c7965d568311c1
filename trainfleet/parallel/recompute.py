"""Recompute: keep a block's inputs, and compute the rest again in backward (Chen et al., arXiv:1604.06174)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from trainfleet.errors import PlanError


def recompute(blocks: Sequence[nn.Module]) -> None:
    """Let each of `blocks` forget its activations. Random numbers are drawn again as they were.

    Batch normalisation would count its batch twice, so it does not update its statistics the second time.
    """
    for block in blocks:
        block.forward = _forgetful(block, block.forward)  # type: ignore[method-assign]


def refuse_no_blocks(model: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """PlanError where there is nothing to recompute."""
    if not blocks:
        raise PlanError(
            f"plan.recompute is 'blocks', but {type(model).__name__} has no repeated modules. "
            "Name them in plan.blocks, or set recompute to 'none'."
        )


def _forgetful(block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    counters = [module for module in block.modules() if getattr(module, "track_running_stats", False)]

    @functools.wraps(forward)
    def forgetful(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        first = True

        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal first
            if first or not counters:
                first = False
                return forward(*args, **kwargs)
            return _without_counting(counters, forward, args, kwargs)

        return checkpoint(run, *args, use_reentrant=False, **kwargs)

    return forgetful


def _without_counting(
    counters: list[nn.Module], forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    buffers = [buffer for module in counters for buffer in module.buffers(recurse=False)]
    kept = [buffer.clone() for buffer in buffers]
    try:
        return forward(*args, **kwargs)
    finally:
        # Also where the recomputation is cut short because all that was wanted has been computed.
        for buffer, value in zip(buffers, kept):
            buffer.copy_(value)
