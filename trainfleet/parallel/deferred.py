"""Build a model without its memory, and fill in its numbers once each rank knows which part it keeps.

    model = deferred(lambda: MyModel(config))      # parameters on the meta device: no memory, no numbers
    ... shard it ...
    materialize(model, "cuda:0", seed=0)           # as `torch.manual_seed(0); MyModel(config)` would have

Every rank draws every random number, in the order of a plain construction and on the CPU whatever the
device, so the numbers are the same bit by bit for any number of ranks; it keeps its own shard of each
tensor. A host holds the shards of its ranks and, for each rank, about the largest tensor.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainfleet.batch import arrays, map_arrays
from trainfleet.errors import PlanError
from trainfleet.parallel.cut import piece_like
from trainfleet.parallel.recorder import Recorder, recording
from trainfleet.parallel.recording import Recording, Storage, View

_ATTRIBUTE = "_trainfleet_deferred"
_MODULE_FIELDS = frozenset(vars(nn.Module()))
_numbers = itertools.count()


@dataclass(slots=True)
class Slot:
    """A place of a module that holds a recorded tensor. Wrapping or renaming the module does not move it."""

    module: nn.Module
    kind: Literal["_parameters", "_buffers"]
    name: str
    view: View
    original: Tensor

    @property
    def tensor(self) -> Tensor:
        """What is there now: the original, its shard, or its real successor."""
        return getattr(self.module, self.kind)[self.name]  # type: ignore[no-any-return]

    @property
    def is_used(self) -> bool:
        return getattr(self.module, self.kind).get(self.name) is not None


@dataclass(slots=True)
class Loose:
    """An attribute of a module that holds recorded tensors without being a parameter or a buffer."""

    module: nn.Module
    name: str
    tensors: list[tuple[Tensor, View]]


@dataclass(slots=True)
class Deferred:
    """A constructor's recording, and where its tensors are in the model."""

    recording: Recording
    start: Tensor
    """The CPU generator before the constructor."""
    left: Tensor
    """The CPU generator after it, while its numbers are not drawn."""
    slots: list[Slot] = field(default_factory=list)
    loose: list[Loose] = field(default_factory=list)
    number: int = field(default_factory=lambda: next(_numbers))
    """Counts up: in which order constructors ran."""


def deferred(build: Callable[[], nn.Module]) -> nn.Module:
    """The model that `build` makes, with parameters and buffers on the meta device until `materialize`.

    Tensors that are real before stay real. Values that follow from no random number may be read in the
    constructor (`torch.linspace(...).tolist()`); PlanError names the line that reads a random one. Nothing is
    drawn from the CPU generator; if the constructor wanted to, it is left at a place of its own.
    """
    start = torch.get_rng_state()
    with recording() as recorder:
        try:
            model = build()
        except BaseException:
            recorder.abandon()
            raise
    kept = Deferred(recorder.finish(), start, torch.get_rng_state())
    for module in model.modules():
        _note(module, recorder, kept)
    model.__dict__[_ATTRIBUTE] = kept
    return model


def is_deferred(model: nn.Module) -> bool:
    """Whether `model`, or a part of it, waits for `materialize`."""
    return any(_ATTRIBUTE in module.__dict__ for module in model.modules())


def starts(model: nn.Module) -> list[Tensor]:
    """The states of the CPU generator from which the constructors of a deferred model will draw."""
    return [module.__dict__[_ATTRIBUTE].start for module in model.modules() if _ATTRIBUTE in module.__dict__]


def materialize(
    model: nn.Module,
    device: torch.device | str,
    *,
    seed: int | None = None,
    shards_on: torch.device | str | None = None,
) -> nn.Module:
    """Give a deferred model its memory and its numbers on `device`; returns the same model.

    The numbers are those of `torch.manual_seed(seed)` and a plain construction; without a seed, those of a
    plain construction at the moment of `deferred`. With a seed, or if nobody drew since `deferred`, the CPU
    generator is left as that construction would have left it; else it is left alone. Call it after sharding, and
    before the optimizer and hooks on parameters are made: parameters that are no DTensors become new objects
    (tied ones stay one). `shards_on` is where the DTensors live if not on `device`, as when they are offloaded.
    """
    owners = [module for module in model.modules() if _ATTRIBUTE in module.__dict__]
    if not owners:
        raise PlanError(f"{type(model).__name__} was not built by `deferred`, so there is nothing to materialise.")
    found = sorted((owner.__dict__[_ATTRIBUTE] for owner in owners), key=lambda each: int(each.number))
    present = set(model.modules())
    for each in found:
        each.slots = [slot for slot in each.slots if slot.module in present and slot.is_used]
        each.loose = [loose for loose in each.loose if loose.module in present]
    slots = [slot for each in found for slot in each.slots]
    _check(model, slots)
    _allocate(model, slots, torch.device(device), torch.device(shards_on or device))
    _draw(found, seed)
    for owner in owners:
        del owner.__dict__[_ATTRIBUTE]
    return model


def _note(module: nn.Module, recorder: Recorder, kept: Deferred) -> None:
    """Remember where `module` holds recorded tensors."""
    kinds: tuple[Literal["_parameters"], Literal["_buffers"]] = ("_parameters", "_buffers")
    for kind in kinds:
        for name, tensor in getattr(module, kind).items():
            if tensor is not None and (view := recorder.view(tensor)):
                kept.slots.append(Slot(module, kind, name, view, tensor))
    for name, value in vars(module).items():
        if name not in _MODULE_FIELDS and isinstance(value, Tensor | list | tuple | dict):
            tensors = [tensor for tensor in arrays(value) if isinstance(tensor, Tensor)]
            views = [(tensor, view) for tensor in tensors if (view := recorder.view(tensor))]
            if views:
                kept.loose.append(Loose(module, name, views))


def _check(model: nn.Module, slots: list[Slot]) -> None:
    known = {id(slot.tensor) for slot in slots}
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_meta and id(tensor) not in known:
            raise PlanError(
                f"{name} is on the meta device, but `deferred` did not see how its numbers are made: it came later, "
                "or its constructor asks for the meta device itself. Build all of the model inside `deferred`."
            )
    for slot in slots:
        if tuple(slot.tensor.shape) != slot.view.size:
            raise PlanError(
                f"{type(slot.module).__name__}.{slot.name} has the shape {tuple(slot.tensor.shape)}, but was built as "
                f"{slot.view.size}. Change shapes inside the function given to `deferred`."
            )


def _allocate(model: nn.Module, slots: list[Slot], device: torch.device, shards_on: torch.device) -> None:
    """Memory for every tensor of `model`; what is real already is moved."""
    made: dict[int, tuple[Tensor, Tensor]] = {}

    def allocate(tensor: Tensor) -> Tensor:
        target = shards_on if isinstance(tensor, DTensor) else device
        if not tensor.is_meta:
            return tensor.to(target)
        if id(tensor) not in made:
            made[id(tensor)] = (tensor, torch.empty_like(tensor, device=target))
        return made[id(tensor)][1]

    parameters = {id(slot.tensor) for slot in slots if slot.kind == "_parameters"}
    before = [  # also where no constructor has put them: what stands in for another stage's module may hold a tied one
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and id(parameter) in parameters
    ]
    # `_apply` lets FSDP2 and recurrent layers notice; it makes a new parameter for each place a tied one stands in.
    model._apply(allocate)  # type: ignore[no-untyped-call]
    successors: dict[int, Tensor] = {}
    for module, name, old in before:
        successor = successors.setdefault(id(old), getattr(module, name))
        if successor is not old:
            successor.__dict__.update(old.__dict__)
            setattr(module, name, successor)


def _draw(found: list[Deferred], seed: int | None) -> None:
    """Run the recordings, one after the other."""
    before = torch.get_rng_state()
    alone = bool(torch.equal(before, found[-1].left))
    state = found[0].start if seed is None else torch.Generator().manual_seed(seed).get_state()
    for each, previous in zip(found, [None, *found[:-1]]):
        if seed is None and previous is not None and not torch.equal(each.start, previous.left):
            state = each.start
        torch.set_rng_state(state)
        _fill(each, state)
        state = torch.get_rng_state()
    if seed is None and not alone:
        torch.set_rng_state(before)


def _fill(each: Deferred, state: Tensor) -> None:
    """Run one recording; each tensor is cut to what this rank keeps as soon as it is finished."""
    places: defaultdict[Storage, list[Slot]] = defaultdict(list)
    for slot in each.slots:
        places[slot.view.storage].append(slot)
    held = {id(slot.original) for slot in each.slots}
    plain: dict[int, Tensor] = {}
    others: defaultdict[Storage, dict[int, tuple[Tensor, View]]] = defaultdict(dict)
    for loose in each.loose:
        for tensor, view in loose.tensors:
            if id(tensor) not in held:
                others[view.storage][id(tensor)] = (tensor, view)

    def receive(storage: Storage, memory: torch.UntypedStorage) -> None:
        for target, view in {id(slot.tensor): (slot.tensor, slot.view) for slot in places[storage]}.values():
            local = target.to_local() if isinstance(target, DTensor) else target
            local.copy_(piece_like(view.on(memory), target))
        for key, (tensor, view) in others[storage].items():
            leaf = tensor.is_leaf and tensor.requires_grad
            plain[key] = view.on(memory).clone().requires_grad_(leaf)

    each.recording.run({*places, *others}, receive, replacing=(each.start, state))
    plain |= {id(slot.original): slot.tensor for slot in each.slots}
    for loose in each.loose:
        value = map_arrays(lambda array: plain.get(id(array), array), vars(loose.module)[loose.name])
        vars(loose.module)[loose.name] = value


def without_recording(model: nn.Module) -> dict[int, None]:
    """For `copy.deepcopy`: leaves out what `model` and its parts wait for."""
    return {id(module.__dict__[_ATTRIBUTE]): None for module in model.modules() if _ATTRIBUTE in module.__dict__}


def forget_recording(model: nn.Module) -> None:
    """A copy made so waits for nothing."""
    for module in model.modules():
        module.__dict__.pop(_ATTRIBUTE, None)


def follow(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """From now on, what a deferred `model` fills in `old` goes into `new`, which has taken its place."""
    for module in model.modules():
        for slot in module.__dict__[_ATTRIBUTE].slots if _ATTRIBUTE in module.__dict__ else ():
            if slot.module is old:
                slot.module = new
