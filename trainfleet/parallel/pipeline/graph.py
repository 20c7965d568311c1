"""Graph: one forward as calls of modules and functions of torch, in the order in which they ran."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, MutableMapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor of one run, by number: an input of the forward, or what a node returned."""

    number: int


@dataclass(frozen=True, slots=True)
class Named:
    """A parameter or buffer of the model, by its name there; read anew in each run."""

    name: str
    is_parameter: bool


@dataclass(frozen=True, slots=True)
class Kind:
    """What is known of a value without running: it must be the same in every run of the graph."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


Modes = tuple[bool, bool, torch.dtype]
"""Whether gradients are recorded, whether autocast is on, and its dtype."""


@dataclass(kw_only=True, slots=True)
class Node:
    """One call. Arguments and output are nestings in which `Value` and `Named` stand for tensors."""

    call: str | Callable[..., Any]
    """The name of a module of the model, or a function of torch."""
    args: Any
    kwargs: Any
    output: Any
    modes: Modes
    cost: float
    """Operations, roughly: those of matrix products, else elements written."""
    is_random: bool
    """Whether it draws random numbers."""
    changes: Value | Named | None
    """What it writes into, where it works in place."""
    renewed: Value | None
    """What stands for that afterwards, where the output does not."""
    where: str
    """File and line of the model's code."""

    @property
    def is_module(self) -> bool:
        return isinstance(self.call, str)

    @property
    def name(self) -> str:
        return self.call if isinstance(self.call, str) else getattr(self.call, "__name__", str(self.call))

    def reads(self) -> list[Value | Named]:
        return references((self.args, self.kwargs))

    def gives(self) -> list[Value]:
        """What later nodes may read of it."""
        return [each for each in references((self.output, self.renewed)) if isinstance(each, Value)]


@dataclass(kw_only=True, slots=True)
class Graph:
    """A whole forward."""

    nodes: list[Node] = field(default_factory=list)
    kinds: dict[int, Kind] = field(default_factory=dict)
    """Of every value, by number."""
    storages: dict[int, int] = field(default_factory=dict)
    """Values with one number here share memory."""
    num_inputs: int = 0
    """The first so many values are the tensors of the input, in order."""
    output: Any = None
    modes: Modes = (True, False, torch.float32)
    """Those that the forward was called in."""


def is_parameter(reference: Value | Named) -> TypeGuard[Named]:
    """Whether it stands for a parameter of the model."""
    return isinstance(reference, Named) and reference.is_parameter


def references(nested: Any) -> list[Value | Named]:
    """Every `Value` and `Named` in a nesting, in order."""
    found: list[Value | Named] = []
    replaced(nested, (Value, Named), lambda each: found.append(each) or each)  # type: ignore[func-returns-value]
    return found


def replaced(nested: Any, kinds: tuple[type, ...], function: Callable[[Any], Any]) -> Any:
    """The same nesting of mappings, lists, tuples, slices and dataclasses, with `function` of everything of `kinds`."""
    if isinstance(nested, kinds):
        return function(nested)
    if isinstance(nested, Mapping):
        mapped = {key: replaced(value, kinds, function) for key, value in nested.items()}
        if type(nested) is dict or not isinstance(nested, MutableMapping):
            return mapped
        clone = nested.copy() if hasattr(nested, "copy") else type(nested)()
        for key, value in mapped.items():
            clone[key] = value
        return clone
    if isinstance(nested, tuple) and hasattr(nested, "_fields"):
        return type(nested)(*(replaced(each, kinds, function) for each in nested))
    if type(nested) in (list, tuple, torch.Size):
        return type(nested)(replaced(each, kinds, function) for each in nested)
    if isinstance(nested, list | tuple):
        members = [replaced(each, kinds, function) for each in nested]
        return members if isinstance(nested, list) else tuple(members)  # what functions of torch return
    if isinstance(nested, slice):
        return slice(*(replaced(each, kinds, function) for each in (nested.start, nested.stop, nested.step)))
    if is_dataclass(nested) and not isinstance(nested, type):
        return _replaced_dataclass(nested, kinds, function)
    return nested


def _replaced_dataclass(nested: Any, kinds: tuple[type, ...], function: Callable[[Any], Any]) -> Any:
    twin = object.__new__(type(nested))
    if hasattr(nested, "__dict__"):
        twin.__dict__.update(nested.__dict__)
    for each in fields(nested):
        if hasattr(nested, each.name):
            object.__setattr__(twin, each.name, replaced(getattr(nested, each.name), kinds, function))
    return twin


def signature(nested: Any) -> Hashable:
    """Equal for inputs that a forward treats alike: of tensors shape and dtype, of all else the value."""
    if isinstance(nested, Tensor):
        return tuple(nested.shape), nested.dtype, nested.requires_grad
    if isinstance(nested, Mapping):
        return type(nested), tuple((key, signature(value)) for key, value in nested.items())
    if isinstance(nested, list | tuple):
        return type(nested), tuple(signature(each) for each in nested)
    if is_dataclass(nested) and not isinstance(nested, type):
        held = ((each.name, getattr(nested, each.name, None)) for each in fields(nested))
        return type(nested), tuple((name, signature(value)) for name, value in held)
    try:
        hash(nested)
    except TypeError:
        return object()  # like no other
    return type(nested), nested
