"""The Codec protocol: an array to smaller arrays and back."""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias, runtime_checkable

Array: TypeAlias = Any
"""A NumPy array or a torch tensor; a codec answers in the kind, and on the device, that it was given."""


@runtime_checkable
class Codec(Protocol):
    """An array to smaller arrays and back. The arrays given are left as they are."""

    def encode(self, array: Array) -> tuple[Array, ...]: ...

    def decode(self, parts: tuple[Array, ...]) -> Array: ...
