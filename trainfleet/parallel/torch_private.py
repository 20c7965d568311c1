"""What we need of torch that has no public name, and what differs between its versions: all of it, here.

Tested with torch 2.13 (CPU) and 2.11 (CUDA).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from torch.distributed import _functional_collectives
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import _StridedShard as StridedShard
from torch.optim._muon import _adjust_lr as adjusted_muon_rate
from torch.optim._muon import _zeropower_via_newtonschulz as orthogonalise
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import _disable_current_modes as outside_modes
from torch.utils._pytree import register_pytree_node
from torch.utils.checkpoint import _StopRecomputationError as EnoughRecomputed

__all__ = [
    "DATA_DEPENDENT",
    "UNSEEN_OPERATORS",
    "EnoughRecomputed",
    "FakeTensor",
    "FakeTensorMode",
    "Leaving",
    "StridedShard",
    "adjusted_muon_rate",
    "backward_of_inputs",
    "backward_of_parameters",
    "eagerly",
    "exchange_within",
    "flash_attention",
    "flash_attention_backward",
    "forget_iteration",
    "function_modes",
    "gathered_parameters",
    "has_flash_attention",
    "in_backward",
    "innermost_saving_hooks",
    "offsets_in_whole",
    "orthogonalise",
    "outside_modes",
    "reduce_unused_gradients",
    "torch_schedule",
    "waits_within",
    "with_local",
    "without_numbers",
    "without_torch_functions",
]

DATA_DEPENDENT = (DataDependentOutputException, DynamicOutputShapeException)
"""What torch raises where the numbers of a tensor are asked for that has none."""
UNSEEN_OPERATORS = (UnsupportedFakeTensorException, UnsupportedOperatorException)
"""What it raises where an operator does not say what it would give."""


def _sharded_groups(root: FSDPModule) -> Iterator[Any]:
    assert isinstance(root, nn.Module)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            state = module._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None)
            if groups is None:  # before torch 2.13 there was one
                groups = [state._fsdp_param_group] if state._fsdp_param_group else []
            yield from groups


def _sharded_parameters(root: FSDPModule) -> Iterator[Any]:
    for group in _sharded_groups(root):
        yield from group.fsdp_params


def gathered_parameters(root: FSDPModule) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """(sharded, gathered) of every sharded parameter that has been gathered at least once.

    Gradients appear on the gathered one. It is the same object each time; its storage comes and goes.
    """
    return [
        (each.sharded_param, each._unsharded_param)
        for each in _sharded_parameters(root)
        if hasattr(each, "_unsharded_param")
    ]


def reduce_unused_gradients(root: FSDPModule) -> None:
    """Exchange zeros for parameters that backward did not reach, so that ranks may differ in which those are."""
    if hasattr(root, "set_reduce_scatter_unused_params"):  # since torch 2.13
        root.set_reduce_scatter_unused_params(True)


def forget_iteration(root: FSDPModule) -> None:
    """After an error in forward or backward: nothing is under way or gathered, and no gradient accumulates."""
    if root._get_fsdp_state()._is_root is None:
        return  # it has not run yet
    if hasattr(root, "reset_iter_state"):  # since torch 2.13
        root.reset_iter_state()
    for each in _sharded_parameters(root):
        each.sharded_param.grad = None
        if hasattr(each, "_unsharded_param"):
            each._unsharded_param.grad = None  # torch says that it discards it too, but does not


_EXCHANGES = ("unshard", "wait_for_unshard", "post_backward", "finalize_backward")
"""Where FSDP2 gathers parameters, takes what came, scatters gradients, and waits for the last of them."""


def exchange_within(root: FSDPModule, entered: Callable[[], AbstractContextManager[Any]]) -> None:
    """From now on FSDP2 packs, exchanges, awaits and unpacks parameters and gradients inside of `entered()`.

    On a CPU the loop itself waits there for the other ranks, on a GPU the stream that computes.
    """
    for group in _sharded_groups(root):
        for name in _EXCHANGES:
            if hasattr(group, name):  # a version that calls it otherwise is still right, but its waits are not seen
                setattr(group, name, _within(entered, getattr(group, name)))


def _within(entered: Callable[[], AbstractContextManager[Any]], call: Callable[..., Any]) -> Callable[..., Any]:
    def inside(*args: Any, **kwargs: Any) -> Any:
        with entered():
            return call(*args, **kwargs)

    return inside


@contextmanager
def waits_within(entered: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """While it is entered, whoever needs the result of an exchange of DTensors waits for it inside of `entered()`."""
    plain = _functional_collectives.wait_tensor
    _functional_collectives.wait_tensor = _within(entered, plain)
    try:
        yield
    finally:
        _functional_collectives.wait_tensor = plain


def with_local(array: DTensor, local: Tensor) -> DTensor:
    """A DTensor like `array` whose piece is `local`, which may rest on another device than the mesh."""
    return DTensor(local, array._spec, requires_grad=False)  # type: ignore[no-untyped-call]


def offsets_in_whole(array: DTensor) -> tuple[int, ...]:
    """Where this rank's piece of a DTensor begins in the whole."""
    mesh = array.device_mesh
    key = (array.shape, mesh.shape, tuple(mesh.get_coordinate() or ()), array.placements)
    if key not in _OFFSETS:  # every save asks for each tensor
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        _, offsets = compute_local_shape_and_global_offset(array.shape, mesh, array.placements)
        _OFFSETS[key] = tuple(offsets)
    return _OFFSETS[key]


_OFFSETS: dict[Any, tuple[int, ...]] = {}
"""By all that they depend on: shape of the whole and of the mesh, this rank's place in it, placements."""


@contextmanager
def eagerly(model: nn.Module) -> Iterator[bool]:
    """Inside, modules that `nn.Module.compile` has compiled run as they were written; whether there are any."""
    compiled = {module: call for module in model.modules() if (call := module._compiled_call_impl) is not None}
    for module in compiled:
        module._compiled_call_impl = None
    try:
        yield bool(compiled)
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call


def in_backward() -> bool:
    """Whether this thread is inside a backward pass, as what is recomputed there is."""
    return bool(torch._C._current_graph_task_id() != -1)


def innermost_saving_hooks() -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]:
    """What packs and unpacks the tensors that are saved for backward now; where nothing does, they stay as they are."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # type: ignore[attr-defined]
    return hooks or (lambda tensor: tensor, lambda tensor: tensor)


def without_torch_functions() -> AbstractContextManager[None]:
    """Inside, no TorchFunctionMode and no subclass of Tensor takes the place of torch's functions."""
    return torch._C.DisableTorchFunction()  # type: ignore[no-any-return]


def has_flash_attention(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `flash_attention` takes these: [B, H, T, D], as many heads and as wide in all of them."""
    if not (q.ndim == k.ndim == v.ndim == 4 and q.shape[-3] == k.shape[-3] and q.shape[-1] == v.shape[-1]):
        return False
    if q.dtype != k.dtype or min(q.numel(), k.numel()) == 0:
        return False
    if q.device.type == "cuda":
        return q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    return q.device.type == "cpu" and q.dtype in (torch.float32, torch.float64, torch.bfloat16)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """(output, logarithm of the sum of exponentials [B, H, T]) of attention, by torch's own kernels."""
    aten = torch.ops.aten
    if q.device.type == "cpu":
        found = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    else:
        found = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return found[0], found[1]


def flash_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; `out` and `lse` may be those of more keys than these."""
    aten = torch.ops.aten
    if q.device.type == "cpu":
        call = aten._scaled_dot_product_flash_attention_for_cpu_backward
        return call(grad, q, k, v, out, lse, 0.0, causal, scale=scale)  # type: ignore[no-any-return]
    seed = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of the dropout that there is none of
    found = aten._scaled_dot_product_flash_attention_backward(
        *(grad, q, k, v, out, lse, None, None, q.shape[-2], k.shape[-2], 0.0, causal, seed, seed[:0]), scale=scale
    )
    return found[0], found[1], found[2]


def torch_schedule(
    name: str, num_ranks: int, stages_per_rank: int, num_micro_batches: int
) -> list[list[tuple[str, int, int]]]:
    """By rank, the (F, B, I or W; stage; micro-batch) of one of torch's schedules of pipelines, without messages."""
    from torch.distributed.pipelining import schedules

    kind = {
        "interleaved_1f1b": schedules.ScheduleInterleaved1F1B,
        "looped_bfs": schedules.ScheduleLoopedBFS,
        "interleaved_zero_bubble": schedules.ScheduleInterleavedZeroBubble,
        "zbv": schedules.ScheduleZBVZeroBubble,
        "dualpipev": schedules.ScheduleDualPipeV,
    }[name]
    # Stages in name only: the orders of all ranks are made from these numbers.
    stage: Any = SimpleNamespace(
        num_stages=num_ranks * stages_per_rank, group_size=num_ranks, group_rank=0, submod=nn.Identity()
    )
    made: Any = kind([stage] * stages_per_rank, num_micro_batches, scale_grads=False)
    rows = []
    for rank in range(num_ranks):
        actions = [action for action in made.pipeline_order[rank] if action is not None]
        flat = [inner for action in actions for inner in (getattr(action, "sub_actions", None) or (action,))]
        rows.append([(each.computation_type.value, each.stage_index, each.microbatch_index) for each in flat])
    return rows


def without_numbers(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operator gives for tensors without numbers."""
    if getattr(func, "overloadpacket", None) is not getattr(torch.ops.aten, "_grouped_mm", None):
        return func(*args, **kwargs)
    # The CPU has products of groups in float32 too, but torch 2.13 says for bfloat16 alone what they would give.
    a, b = args[:2]
    groups = kwargs.get("offs", args[2] if len(args) > 2 else None)
    shape = {
        (2, 2): (groups.shape[0] if groups is not None else 0, a.shape[0], b.shape[-1]),
        (2, 3): (a.shape[0], b.shape[-1]),
        (3, 2): (a.shape[-2], b.shape[-1]),
        (3, 3): (a.shape[0], a.shape[-2], b.shape[-1]),
    }[a.ndim, b.ndim]
    return a.new_empty(shape, dtype=kwargs.get("out_dtype") or a.dtype)


class Leaving(list[Tensor]):
    """The tensors that a part of a model returns to the next: no output, but FSDP2 looks for them there."""


register_pytree_node(Leaving, lambda leaving: (list(leaving), None), lambda tensors, _: Leaving(tensors))


def backward_of_inputs(
    roots: list[Tensor], gradients: list[Tensor | None], inputs: list[Tensor], parameters: Sequence[nn.Parameter]
) -> Any:
    """The gradients of `inputs` alone, into their `.grad`; what `backward_of_parameters` needs for the rest."""
    from torch.distributed.pipelining._backward import stage_backward_input

    roots = [root.clone() if root._is_view() else root for root in roots]  # they are detached in place
    filled = [torch.ones_like(root) if each is None else each for root, each in zip(roots, gradients)]
    _, groups = stage_backward_input(roots, filled, inputs, iter(parameters))
    return groups


def backward_of_parameters(groups: Any, parameters: Sequence[nn.Parameter]) -> None:
    """Add the gradients of `parameters`."""
    from torch.distributed.pipelining._backward import stage_backward_weight

    stage_backward_weight(iter(parameters), groups)


def function_modes() -> list[TorchFunctionMode]:
    """The modes that now stand in for torch's functions, the outermost first."""
    return list(_get_current_function_mode_stack())  # type: ignore[no-untyped-call]


@contextmanager
def gathered_quietly() -> Iterator[None]:
    """Around the gathering of whole tensors: torch warns where one lies over two axes, that it takes two exchanges."""
    told = logging.getLogger("torch.distributed.tensor._redistribute")
    before = told.level
    told.setLevel(logging.ERROR)
    try:
        yield
    finally:
        told.setLevel(before)
