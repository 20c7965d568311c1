"""split_experts: deal the experts of a model out over ranks, found by the structure that transformers 5 uses too."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from trainfleet.errors import PlanError
from trainfleet.parallel.experts.dispatch import dispatched

logger = logging.getLogger(__name__)

_TAKES = ["hidden_states", "top_k_index", "top_k_weights"]


def find_experts(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of stacked experts: forward(hidden_states, top_k_index, top_k_weights), `num_experts`, and parameters
    that all have one entry an expert in their first dimension. Each must be linear in the weights of the choices."""
    found = {}
    for name, module in model.named_modules():
        number = getattr(module, "num_experts", None)
        if not isinstance(number, int) or any(True for child in module.children() for _ in child.parameters()):
            continue
        shapes = [parameter.shape for parameter in module.parameters(recurse=False)]
        takes = list(inspect.signature(module.forward).parameters)
        if takes[:3] == _TAKES and shapes and all(len(shape) > 1 and shape[0] == number for shape in shapes):
            found[name] = module
    return found


def split_experts(model: nn.Module, mesh: DeviceMesh) -> tuple[str, ...]:
    """Let each rank of axis ep of `mesh` (axes ep_replicate, ep) keep its part of all experts, in place; their names.

    All ranks hold equal parameters before. Raises PlanError before anything is changed where that cannot be.
    """
    experts = find_experts(model)
    size = mesh["ep"].size()
    if not experts:
        raise PlanError(
            f"plan.ep is {size}, but {type(model).__name__} has no experts: no module with stacked parameters that "
            "takes (hidden_states, top_k_index, top_k_weights). Use trainfleet.parallel.MixtureOfExperts, or set ep=1."
        )
    for name, module in experts.items():
        number = int(module.num_experts)  # type: ignore[arg-type]
        if number % size:
            divisors = ", ".join(str(each) for each in range(1, number + 1) if number % each == 0)
            raise PlanError(f"plan.ep={size} does not divide the {number} experts of {name}. Use one of {divisors}.")
    _refuse_shared(model, experts)
    for module in experts.values():
        _split(module, mesh)
    logger.info("Expert parallel over %d ranks: %s.", size, ", ".join(experts))
    return tuple(experts)


def _refuse_shared(model: nn.Module, experts: dict[str, nn.Module]) -> None:
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), []).append(name)
    for name, module in experts.items():
        for parameter in module.parameters():
            if len(others := users[id(parameter)]) > 1:
                raise PlanError(
                    f"The experts of {name} are shared by {' and '.join(others)}; shared experts are not dealt out. "
                    "Set plan.ep to 1."
                )


def _split(module: nn.Module, mesh: DeviceMesh) -> None:
    number = int(module.num_experts)  # type: ignore[arg-type]
    size, rank = mesh["ep"].size(), mesh["ep"].get_local_rank()
    own = number // size
    for name, parameter in module._parameters.items():
        assert parameter is not None
        # A copy, or the memory of the whole would stay.
        piece = parameter.detach().narrow(0, rank * own, own).clone()
        array = DTensor.from_local(piece, mesh, [Replicate(), Shard(0)], run_check=False)
        cut = nn.Parameter(array, requires_grad=parameter.requires_grad)
        cut.__dict__.update(parameter.__dict__)
        if cut.requires_grad:
            # It got the tokens of `size` ranks, and the mean is taken over those that hold the same experts.
            cut.register_hook(functools.partial(_divided, size))  # type: ignore[no-untyped-call]
        module._parameters[name] = cut
    module.num_experts = own  # type: ignore[assignment]
    module.forward = _dealt_out(module, module.forward, number, mesh)  # type: ignore[method-assign]


def _divided(size: int, gradient: Tensor) -> Tensor:
    return gradient / size


def _dealt_out(
    module: nn.Module, forward: Callable[..., Any], num_experts: int, mesh: DeviceMesh
) -> Callable[..., Tensor]:
    group = mesh.get_group("ep")

    @functools.wraps(forward)
    def dealt_out(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if isinstance(hidden_states, DTensor):
            raise PlanError(
                f"The experts of {type(module).__name__} lie inside a module whose layers plan.tp splits, and plan.ep "
                "deals them out. Name that module in plan.tp_whole, or set one of tp and ep to 1."
            )
        with _local_parameters(module):
            return dispatched(forward, hidden_states, top_k_index, top_k_weights, num_experts=num_experts, group=group)

    return dealt_out


@contextmanager
def _local_parameters(module: nn.Module) -> Iterator[None]:
    """This rank's experts as plain tensors in the place of the DTensors, through which their gradients flow."""
    held = dict(module._parameters)
    try:
        for name, parameter in held.items():
            assert isinstance(parameter, DTensor)
            module._parameters[name] = parameter.to_local()  # type: ignore[assignment]
        yield
    finally:
        module._parameters.update(held)


def is_expert(parameter: Tensor) -> bool:
    """Whether `parameter` holds experts that are dealt out."""
    return isinstance(parameter, DTensor) and "ep" in (parameter.device_mesh.mesh_dim_names or ())
