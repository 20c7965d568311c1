"""Precision: where bf16 or fp16 is used and where float32 stays, the same in every strategy.

    parameters, gradients, their exchange,
    optimizer state, gradient accumulation         float32 (masters)
    matrix products, convolutions, attention       bf16 or fp16
    modules whose class name contains "norm"       float32, inputs raised
    softmax, log-softmax, losses, powers and sums  float32 (FLOAT32_OPERATORS)
    recurrent modules on a CPU                     float32 (there is no fp16 kernel)
    modules named in plan.float32_modules          float32
    the model's output and the loss                float32

Autocast does the casting around each operator, so replicated and sharded parameters go through the very
same arithmetic: DDP with autocast and FSDP2 with its own casting do not. `watch_dtypes` holds a run against the table.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.optim import Optimizer

from trainfleet.batch import arrays, map_arrays
from trainfleet.errors import PlanError
from trainfleet.parallel.blocks import is_named
from trainfleet.parallel.torch_private import Leaving
from trainfleet.plan import Plan

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NARROW = (torch.bfloat16, torch.float16)

FLOAT32_OPERATORS = (
    # softmax and losses
    *("softmax.int", "log_softmax.int", "logsumexp", "nll_loss", "nll_loss_nd", "cross_entropy_loss", "kl_div"),
    *("binary_cross_entropy_with_logits", "poisson_nll_loss", "hinge_embedding_loss", "margin_ranking_loss"),
    *("soft_margin_loss", "triplet_margin_loss", "cosine_similarity"),
    # norms and distances
    *("layer_norm", "native_layer_norm", "group_norm", "rms_norm", "norm.Scalar", "norm.ScalarOpt_dim"),
    *("linalg_vector_norm", "linalg_matrix_norm", "linalg_matrix_norm.str_ord", "frobenius_norm.dim"),
    *("nuclear_norm", "nuclear_norm.dim", "renorm", "dist", "pdist"),
    # sums and powers
    *("sum", "sum.dim_IntList", "prod", "cumsum", "cumprod", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar"),
    *("exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt", "softplus"),
    *("acos", "asin", "cosh", "sinh", "tan", "erfinv"),
    # resampling
    *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d", "upsample_bilinear2d"),
    *("upsample_bicubic2d", "upsample_trilinear3d", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d"),
    *("_upsample_nearest_exact3d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"),
)
"""CUDA's autocast keeps these in float32; the CPU's does not, so we make it. mse and l1 losses already agree."""

_registered: list[torch.library.Library] = []


def cast_compute(model: nn.Module, plan: Plan, device_type: str) -> nn.Module:
    """Let `model` compute in plan.precision, except where float32 stays. Changes forwards in place."""
    if plan.precision == "fp32":
        return model
    if device_type == "cpu":
        _register_float32_operators()
    for _, module in float32_modules(model, plan, device_type):
        module.forward = _in_float32(module.forward, device_type)  # type: ignore[method-assign]
    for entry in ("forward", *plan.entry_points):
        setattr(model, entry, _in_autocast(getattr(model, entry), device_type, DTYPES[plan.precision]))
    return model


def float32_modules(model: nn.Module, plan: Plan, device_type: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules that compute in float32 whatever the plan's precision."""
    for name, module in model.named_modules():
        is_norm = "norm" in type(module).__name__.lower() and not any(True for _ in module.children())
        is_recurrent_on_cpu = isinstance(module, nn.RNNBase | nn.RNNCellBase) and device_type == "cpu"
        is_wanted = any(is_named(name, module, pattern) for pattern in plan.float32_modules)
        if is_norm or is_recurrent_on_cpu or is_wanted:
            yield name, module


def raise_to_float32(value: Any) -> Any:
    """bf16 and fp16 tensors of any nesting as float32."""
    return map_arrays(lambda x: x.float() if x.dtype in NARROW else x, value)


def refuse_narrow_parameters(model: nn.Module) -> None:
    """PlanError where a trained parameter is not held in float32 or wider; frozen ones may be narrow."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype in NARROW:
            raise PlanError(
                f"Parameter {name} is {str(parameter.dtype).removeprefix('torch.')}; trained parameters are held in "
                "float32 and cast for each use, or small updates would round to nothing. "
                "Build the model in float32 (`model.float()`) and set plan.precision."
            )


def _in_autocast(forward: Callable[..., Any], device_type: str, dtype: torch.dtype) -> Callable[..., Any]:
    @functools.wraps(forward)
    def in_autocast(*args: Any, **kwargs: Any) -> Any:
        # Autocast's cache would keep a narrow copy of every parameter until forward ends, gathered ones too.
        with torch.autocast(device_type, dtype=dtype, cache_enabled=False):
            output = forward(*args, **kwargs)
        return raise_to_float32(output)

    return in_autocast


def _in_float32(forward: Callable[..., Any], device_type: str) -> Callable[..., Any]:
    @functools.wraps(forward)
    def in_float32(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device_type, enabled=False):
            return forward(*raise_to_float32(args), **raise_to_float32(kwargs))

    return in_float32


@contextmanager
def watch_dtypes(model: nn.Module, plan: Plan, device_type: str) -> Iterator[list[str]]:
    """Inside, each module whose output is not of the dtype that the table says puts a sentence into the list."""
    found: list[str] = []
    handles = []
    raised = dict(float32_modules(model, plan, device_type)) if plan.precision != "fp32" else {}
    inside = {inner for module in raised.values() for inner in module.modules()}
    for name, module in model.named_modules():
        if module is not model and plan.compile:
            continue  # hooks would have it compiled again
        wanted = torch.float32
        if module is not model and module not in inside and _is_product(module):
            wanted = DTYPES[plan.precision]
        elif name not in raised and module is not model:
            continue
        handles.append(module.register_forward_hook(_note_dtype(name, wanted, found)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _is_product(module: nn.Module) -> bool:
    if not isinstance(module, nn.Linear | _ConvNd):
        return False
    return type(module).forward in _PRODUCTS and module.weight.dtype == torch.float32


_PRODUCTS = {cls.forward for cls in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)} | {
    cls.forward for cls in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
}


def _note_dtype(name: str, wanted: torch.dtype, found: list[str]) -> Callable[..., None]:
    def note(module: nn.Module, args: Any, output: Any) -> None:
        for array in () if isinstance(output, Leaving) else arrays(output):
            concerns = array.is_floating_point() and (array.dtype in NARROW or wanted in NARROW)
            if concerns and array.dtype != wanted:
                found.append(_sentence(name or "The model", type(module).__name__, array.dtype, wanted))
                return

    return note


def _sentence(name: str, kind: str, dtype: torch.dtype, wanted: torch.dtype) -> str:
    remedy = (
        "Take out its own casts and autocast regions; plan.precision does the casting."
        if dtype in NARROW
        else "Take out what keeps it there (a cast, a switched-off autocast), or name it in plan.float32_modules."
    )
    computed, planned = (str(each).removeprefix("torch.") for each in (dtype, wanted))
    return f"{name} ({kind}) computed {computed} where the plan says {planned}. {remedy}"


def refuse_narrow_state(named: Iterable[tuple[str, nn.Parameter]], optimizer: Optimizer) -> None:
    """PlanError where a gradient, or what the optimizer remembers of a parameter, is narrower than float32."""
    for name, parameter in named:
        remembered = {"grad": parameter.grad, **optimizer.state.get(parameter, {})}
        for key, value in remembered.items():
            if parameter.requires_grad and isinstance(value, Tensor) and value.dtype in NARROW:
                raise PlanError(
                    f"{key} of {name} is {str(value.dtype).removeprefix('torch.')}; gradients and optimizer state stay "
                    f"float32, or small updates would round to nothing. Make {type(optimizer).__name__} keep float32."
                )


def _register_float32_operators() -> None:
    """Give the CPU's autocast the float32 list of CUDA's. Once a process, when first needed."""
    if _registered:
        return
    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    autocast_cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

    def raised(operator: Any) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(autocast_cpu):
                return operator(*(_raise(a) for a in args), **{k: _raise(v) for k, v in kwargs.items()})

        return call

    for name in FLOAT32_OPERATORS:
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "AutocastCPU"):
            continue  # this version of torch raises it by itself
        packet, _, overload = name.partition(".")
        operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
        library.impl(name, raised(operator), "AutocastCPU")  # type: ignore[no-untyped-call]
    _registered.append(library)


def _raise(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in NARROW else value
