"""Group and Links: what peers in step can do with each other's arrays.

A group's members make the same calls in the same order. Arrays are NumPy arrays or torch tensors;
a group hands back the kind it was given. Every wait ends at the group's deadline with `PeerError`,
after which the group is of no more use: some members may have finished the call and others not.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

Array: TypeAlias = Any
Json: TypeAlias = Any  # None, bool, int, float, str, and lists and dicts of them
Reduction: TypeAlias = Literal["sum", "mean", "max", "min"]

DEADLINE = timedelta(minutes=10)
"""How long a group waits for its members when nobody says otherwise."""


@runtime_checkable
class Work(Protocol):
    """A collective under way. Its array may be read and written again once `wait` has returned."""

    def wait(self, timeout: timedelta | None = None) -> None:
        """Return when it is done; PeerError after `timeout`, or after the group's deadline."""
        ...


@runtime_checkable
class Group(Protocol):
    """Peers in step that exchange arrays of equal shape and dtype. What ends with `_` works in place."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_reduce_(self, array: Array, op: Reduction = "sum") -> Work:
        """Every member's `array` becomes the sum (mean, largest, smallest) of all."""
        ...

    def broadcast_(self, array: Array, source: int = 0) -> Work:
        """Every member's `array` becomes that of rank `source`."""
        ...

    def all_gather(self, array: Array) -> list[Array]:
        """The arrays of all members, by rank."""
        ...

    def reduce_scatter(self, array: Array, op: Literal["sum", "mean"] = "sum") -> Array:
        """This rank's part, along the first dimension, of the sum (mean) of all members' arrays."""
        ...

    def exchange(self, value: Json) -> list[Json]:
        """A small value from every member, by rank; it travels as JSON."""
        ...

    def barrier(self, timeout: timedelta | None = None) -> None:
        """Return when every member has come here; PeerError names those that did not."""
        ...

    def split(self, colour: int, name: str = "") -> Group:
        """The group of those that gave the same `colour`, in the order of their ranks here; all members call it."""
        ...


@runtime_checkable
class Links(Protocol):
    """Arrays from one member to another, in the order they were sent."""

    def send(self, array: Array, to: int) -> Work:
        """`array` to rank `to`, which receives it with `recv_`."""
        ...

    def recv_(self, array: Array, source: int) -> Work:
        """`array` becomes the next one that rank `source` sent here; shape and dtype must agree."""
        ...

    def all_to_all(self, arrays: Sequence[Array]) -> list[Array]:
        """Array i goes to rank i; returns one from each rank. Equal dtypes, any shapes. Shapes travel as JSON."""
        ...
