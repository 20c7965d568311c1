"""Recompute: keep a block's inputs, and compute the rest again in backward (Chen et al., arXiv:1604.06174).

`selective` also keeps what is dear to compute and small to hold: products and attention (Korthikanti et al.,
arXiv:2205.05198). Then only what is cheap is computed again: norms, activations, dropout, additions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from trainfleet.errors import PlanError
from trainfleet.parallel.budget import Budget, Cost
from trainfleet.parallel.torch_private import function_modes, outside_modes

PRODUCTS = (
    *("mm", "addmm", "bmm", "baddbmm", "convolution"),
    *("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu"),
    *("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention"),
)
"""What `selective` keeps unless the plan names others; operators of torch by name."""


def recompute(blocks: Sequence[nn.Module], keep: Sequence[str] = (), budget: Budget | None = None) -> None:
    """Let each of `blocks` forget its activations, but for the results of the operators `keep`, such as PRODUCTS.

    Random numbers are drawn again as they were. Batch normalisation would count its batch twice, so it does not update
    its statistics the second time. `budget` may leave some blocks as they are, once it has measured them.
    PlanError for an operator that torch does not have.
    """
    contexts = functools.partial(create_selective_checkpoint_contexts, _policy(keep)) if keep else noop_context_fn
    for block in blocks:
        cost = budget.cost_of(block) if budget is not None else None
        block.forward = _forgetful(block, block.forward, contexts, cost)  # type: ignore[method-assign]


def _policy(keep: Sequence[str]) -> Callable[..., CheckpointPolicy]:
    kept = set()
    for name in keep:
        namespace, _, short = name.rpartition("::")
        try:
            kept.add(getattr(getattr(torch.ops, namespace or "aten"), short))
        except AttributeError as exc:
            raise PlanError(
                f"plan.recompute_keep names {name!r}, but torch has no such operator. Name one as torch's profiler "
                "does, such as 'addmm' or 'mine::my_kernel'."
            ) from exc

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        is_kept = getattr(operator, "overloadpacket", None) in kept
        return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE

    return policy


def stop_caching(model: nn.Module) -> None:
    """Let models of Hugging Face keep no keys and values of the past unless a call asks for it, as `generate` does.

    They would in training too, and a recomputed block would add its own to them a second time.
    """
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "use_cache", None) is True:
            config.use_cache = False  # type: ignore[union-attr]


def refuse_no_blocks(model: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """PlanError where there is nothing to recompute."""
    if not blocks:
        raise PlanError(
            f"plan.recompute and plan.activations ask for blocks, but {type(model).__name__} has no repeated modules. "
            "Name them in plan.blocks, or set recompute to 'none' and activations to 'keep'."
        )


def _forgetful(
    block: nn.Module, forward: Callable[..., Any], contexts: Callable[[], Any], cost: Cost | None
) -> Callable[..., Any]:
    counters = [module for module in block.modules() if getattr(module, "track_running_stats", False)]

    @functools.wraps(forward)
    def forgetful(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or (cost is not None and cost.is_kept):
            return forward(*args, **kwargs)
        first = True
        modes = function_modes()  # of a region around the block, which backward knows nothing of
        names = [name for name, value in kwargs.items() if isinstance(value, Tensor)]
        others = {name: value for name, value in kwargs.items() if name not in names}

        def run(*values: Any) -> Any:
            nonlocal first
            args, named = values[: len(values) - len(names)], values[len(values) - len(names) :]
            kwargs = others | dict(zip(names, named))
            if first:
                first = False
                with cost.measuring([v for v in values if isinstance(v, Tensor)]) if cost else nullcontext():
                    return forward(*args, **kwargs)
            with ExitStack() as again:
                for mode in modes:
                    if mode not in function_modes():
                        again.enter_context(mode)
                if cost is not None:
                    again.enter_context(cost.timing())
                return _without_counting(counters, forward, args, kwargs)

        # Tensors in a row, for torch keeps those alone as autograd keeps tensors, which plan.activations sees.
        tensors = [kwargs[name] for name in names]
        return checkpoint(run, *args, *tensors, use_reentrant=False, context_fn=contexts)

    return forgetful


def _without_counting(
    counters: list[nn.Module], forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if not counters:
        return forward(*args, **kwargs)
    buffers = [buffer for module in counters for buffer in module.buffers(recurse=False)]
    with outside_modes():  # what looks for kept results would look for these too
        kept = [buffer.clone() for buffer in buffers]
    try:
        return forward(*args, **kwargs)
    finally:
        # Also where the recomputation is cut short because all that was wanted has been computed.
        with outside_modes():
            for buffer, value in zip(buffers, kept):
                buffer.copy_(value)
