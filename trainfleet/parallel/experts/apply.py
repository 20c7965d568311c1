"""split_experts: deal the experts of a model out over ranks, found by the structure that transformers 5 uses too."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from trainfleet.errors import PlanError
from trainfleet.parallel.context.handover import array_of
from trainfleet.parallel.context.lift import AXIS, lifted, names
from trainfleet.parallel.experts.dispatch import dispatched
from trainfleet.parallel.tensor.exchange import local_of, placed
from trainfleet.parallel.torch_private import StridedShard, without_torch_functions

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


def split_experts(model: nn.Module, mesh: DeviceMesh, *, whole: nn.Module | None = None) -> tuple[str, ...]:
    """Let each rank of axis ep of `mesh` (axes ep_replicate, ep) keep its part of all experts, in place; their names.

    All ranks hold equal parameters before. `whole` is the model of which `model` holds but some stages, maybe such as
    have no experts. Raises PlanError, on all ranks and before anything is changed, where that cannot be.
    """
    everywhere, size = find_experts(whole or model), mesh["ep"].size()
    if not everywhere:
        raise PlanError(
            f"plan.ep is {size}, but {type(model).__name__} has no experts: no module with stacked parameters that "
            "takes (hidden_states, top_k_index, top_k_weights). Use trainfleet.parallel.MixtureOfExperts, or set ep=1."
        )
    for name, module in everywhere.items():
        number = int(module.num_experts)  # type: ignore[arg-type]
        if number % size:
            divisors = ", ".join(str(each) for each in range(1, number + 1) if number % each == 0)
            raise PlanError(f"plan.ep={size} does not divide the {number} experts of {name}. Use one of {divisors}.")
    _refuse_shared(whole or model, everywhere)
    experts = find_experts(model)
    for module in experts.values():
        _split(module, mesh)
    logger.info("Expert parallel over %d ranks: %s.", size, ", ".join(experts) or "none in these stages")
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

    def of_plain(tokens: Tensor, chosen: Tensor, weights: Tensor, weighing: int = 1) -> Tensor:
        with _local_parameters(module, weighing):
            return dispatched(forward, tokens, chosen, weights, num_experts=num_experts, group=group)

    @functools.wraps(forward)
    def dealt_out(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if not isinstance(hidden_states, DTensor):
            return of_plain(hidden_states, top_k_index, top_k_weights)
        if names(hidden_states.device_mesh) != (AXIS,):
            raise PlanError(
                f"The experts of {type(module).__name__} lie inside a module whose layers plan.tp splits, and plan.ep "
                "deals them out. Name that module in plan.tp_whole, or set one of tp and ep to 1."
            )
        with without_torch_functions():
            return _of_pieces(of_plain, hidden_states, top_k_index, top_k_weights)

    return dealt_out


def _of_pieces(of_plain: Callable[..., Tensor], hidden_states: DTensor, *routing: Tensor) -> Tensor:
    """What experts make of this rank's tokens, where sequences are in pieces; of copies, all ranks let them be made.

    Gradients are means over the ranks of cp: parts count for as many ranks as there are.
    """
    mesh, (lies,) = hidden_states.device_mesh, hidden_states.placements
    if not isinstance(lies, Shard | StridedShard) or lies.dim != 0:
        lies = Replicate()
    local = [local_of(placed(lifted(each, mesh), lies)) for each in (hidden_states, *routing)]
    made = of_plain(*local, weighing=1 if lies.is_replicate() else mesh.size())
    return array_of(made, mesh, lies, tuple(hidden_states.shape))


@contextmanager
def _local_parameters(module: nn.Module, weighing: int) -> Iterator[None]:
    """This rank's experts as plain tensors in the place of the DTensors, through which their gradients flow.

    What flows counts `weighing` times.
    """
    held = dict(module._parameters)
    try:
        for name, parameter in held.items():
            assert isinstance(parameter, DTensor)
            module._parameters[name] = local = parameter.to_local()  # type: ignore[assignment]
            if weighing != 1 and local.requires_grad:
                local.register_hook(functools.partial(torch.mul, other=weighing))  # type: ignore[no-untyped-call]
        yield
    finally:
        module._parameters.update(held)


def by_shape(model: nn.Module) -> None:
    """Let the experts of `model`, a copy without numbers, give what they would, whoever gets how many tokens."""
    for module in find_experts(model).values():
        plain = type(module)
        if plain not in _by_shape:  # one for each class, so that modules alike stay alike
            made = {"forward": _given_by_shape, "__module__": plain.__module__}
            _by_shape[plain] = type(plain.__name__, (plain,), made)
        module.__class__ = _by_shape[plain]


_by_shape: dict[type[nn.Module], type[nn.Module]] = {}


def _given_by_shape(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    numbers = sum(parameter.numel() for parameter in self.parameters()) // self.num_experts
    # As many operations as those of each token's experts together.
    made = hidden_states.new_empty(top_k_index.numel(), numbers) @ hidden_states.new_empty(numbers, 1)
    weighed = made.sum() * top_k_weights.sum() * sum(parameter.sum() for parameter in self.parameters())
    result: Tensor = (hidden_states * weighed).to(hidden_states.dtype)
    return result


def is_expert(parameter: Tensor) -> bool:
    """Whether `parameter` holds experts that are dealt out."""
    return isinstance(parameter, DTensor) and "ep" in (parameter.device_mesh.mesh_dim_names or ())
