"""What a run remembers: things with a state, and arrays of which each rank holds a piece.

A `ShardedArray` names its place in the whole array, so that pieces written by four ranks can be
read by three, and by a library that knows nothing of the one that wrote them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Stateful(Protocol):
    """Anything whose state can be taken and put back.

    The state is a nested mapping whose leaves are `ShardedArray`, `PerRank`, NumPy arrays, torch tensors,
    strings, bytes, numbers, booleans, None and `Setting`s. `load_state_dict` gets a state of the same structure.
    Leaves that are neither sharded nor per rank are the same on every rank: that of rank 0 stands for all.
    """

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any], /) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardedArray:
    """The piece of a named array that this rank holds."""

    name: str
    """Its name in the whole model, such as `blocks.3.mlp.weight`."""
    global_shape: tuple[int, ...]
    """The shape of the whole."""
    offsets: tuple[int, ...]
    """Where the piece begins in the whole, one number a dimension."""
    local: Any
    """The piece: a NumPy array or a torch tensor; empty where this rank holds nothing."""
    replica: int = 0
    """Which of several equal copies this is; only copy 0 needs to be stored."""

    def __post_init__(self) -> None:
        if not len(self.global_shape) == len(self.offsets) == len(self.shape):
            raise ValueError(
                f"The piece of {self.name!r} has shape {self.shape} and offsets {self.offsets} in {self.global_shape}; "
                "all three need one number a dimension."
            )
        if 0 not in self.shape:
            for offset, length, whole in zip(self.offsets, self.shape, self.global_shape):
                if offset < 0 or offset + length > whole:
                    raise ValueError(
                        f"The piece of {self.name!r} at {self.offsets} with shape {self.shape} "
                        f"does not lie within the whole, {self.global_shape}."
                    )

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(n) for n in self.local.shape)

    @property
    def dtype(self) -> str:
        """Its name without the library: `float32`, `bfloat16`, `int64`."""
        return str(self.local.dtype).removeprefix("torch.")


@dataclass(frozen=True, slots=True)
class PerRank:
    """A part of a state that is this rank's own, such as the state of its random generator.

    Every rank's is stored and given back to the rank of the same number, inside a `PerRank` again.
    A rank that had none when the state was taken keeps what it has.
    """

    value: Any
    """A leaf, or a nesting of leaves, but no `ShardedArray`."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A part of a state that decides what the numbers mean, such as a precision.

    Where the stored one differs from the live one, a restore is refused unless `cast` allows it; then the live one
    stands. A state is given its live setting back.
    """

    value: str | int | float | bool | None


def is_tensor(value: Any) -> bool:
    """Whether this is a torch tensor; asking does not import torch."""
    torch = sys.modules.get("torch")  # whoever holds a tensor has imported it
    return torch is not None and hasattr(torch, "Tensor") and isinstance(value, torch.Tensor)


def stateful_among(objects: Iterable[object]) -> dict[str, Stateful]:
    """Those that have a state, by class name; of several of one class, the second is called `Name 2`."""
    found: dict[str, Stateful] = {}
    for each in objects:
        if isinstance(each, Stateful):
            name = type(each).__name__
            number = sum(other.split(" ")[0] == name for other in found) + 1
            found[name if number == 1 else f"{name} {number}"] = each
    return found
