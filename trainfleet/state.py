"""What a run remembers: things with a state, and arrays of which each rank holds a piece.

A `ShardedArray` names its place in the whole array, so that pieces written by four ranks can be
read by three, and by a library that knows nothing of the one that wrote them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Stateful(Protocol):
    """Anything whose state can be taken and put back.

    The state is a nested mapping whose leaves are `ShardedArray`, NumPy arrays, torch tensors,
    strings, numbers, booleans and None. `load_state_dict` gets a state of the same structure.
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

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(n) for n in self.local.shape)

    @property
    def dtype(self) -> str:
        """Its name without the library: `float32`, `bfloat16`, `int64`."""
        return str(self.local.dtype).removeprefix("torch.")
