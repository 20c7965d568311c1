"""Where something that is not finite came into being in a forward, and what it came from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from trainfleet.training.inspection.values import Lines, Values

Place: TypeAlias = Literal["given", "output", "code", "loss", "batch"]
"""given: what the model was called with. output: what a module without children gave. code: of a module that calls
others, outside of them. loss: the loss function. batch: what the loss function was called with beside the output."""


@dataclass(eq=False, kw_only=True)
class Birth:
    """A tensor that is not finite and was made of others, or by nobody who was watched."""

    place: Place
    module: str
    """The module whose output it is, or in whose code it was made; empty for the model itself."""
    tensor: str
    """Which of its tensors, in words."""
    values: Values
    lines: Lines
    at: int
    """Does not fall with time; on ranks that make the same calls, equal at the same place."""
    call: int
    """Of the model, or of that module where the model itself is not called: 1 is the first of a step."""
    caller: str
    """The module whose calls `call` counts."""
    after: str | None = None
    """For code: the last module that it had called."""
    before: str | None = None
    """The next one."""
    cause: Birth | None = None
    is_healed: bool = False
    """A module that was given it gave what is finite."""

    @property
    def root(self) -> Birth:
        """What it came from in the end."""
        found = self
        while found.cause is not None:
            found = found.cause
        return found

    @property
    def first_nan(self) -> Birth | None:
        """On the way from the root to here, the first that holds NaN."""
        line: list[Birth] = []
        at: Birth | None = self
        while at is not None:
            line.append(at)
            at = at.cause
        return next((each for each in reversed(line) if each.values.has_nan), None)


@dataclass(eq=False, slots=True)
class Frame:
    """One call of a module."""

    module: str
    parent: Frame | None
    index: int
    """Which of its parent's calls of children it is."""
    call: int
    caller: str
    visible: list[Birth] = field(default_factory=list)
    """What its code could have made something of: its inputs, and what its children gave."""
    inputs: list[Birth] = field(default_factory=list)
    children: list[str] = field(default_factory=list)


def worst(births: Iterable[Birth]) -> Birth | None:
    """The one that others most likely come from: NaN before infinities, those before what masks hold, then by time."""
    return min(
        (each for each in births if not each.is_healed),
        key=lambda each: (not each.values.has_nan, each.values.is_minus_inf_alone, each.at),
        default=None,
    )
