"""Which steps are looked at closely: `3`, or `10-12`; and the settings of what looks at them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

from trainfleet.errors import ConfigError
from trainfleet.plan import STRICT


@dataclass(frozen=True, slots=True)
class StepRange:
    """Steps, both ends included; 1 is the first of a run."""

    first: int
    last: int

    @classmethod
    def parsed(cls, value: int | str, key: str) -> StepRange:
        """ConfigError that names `key` where `value` is no range."""
        found = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", str(value))
        first = int(found[1]) if found else 0
        last = int(found[2] or first) if found else 0
        if not 1 <= first <= last:
            raise ConfigError(
                f"{key} is {value!r}; give a step such as 3, or the first and the last of several such as 10-12, "
                "counted from 1."
            )
        return cls(first, last)

    def what_is_left(self, taken: int, steps: int) -> str:
        """In words, for a run that begins after `taken` steps and ends after `steps`, and so lacks some of these."""
        if taken >= self.last:
            return f"this run begins after step {taken}, so none is looked at"
        if self.first > steps:
            return f"this run ends after step {steps}, so none is looked at"
        return f"this run begins after step {taken}, so only those after it are looked at"

    def __contains__(self, step: int) -> bool:
        return self.first <= step <= self.last

    def __str__(self) -> str:
        return f"{self.first}" if self.first == self.last else f"{self.first}-{self.last}"


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryConfig:
    """Steps whose memory is reported: by kind, phase and module, with the peak and what held it."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    steps: int | str = 3
    """One step (3), or several (3-8), the last of which is reported; of four and more also what grows. These steps
    are slower, the others are not."""

    def __post_init__(self) -> None:
        StepRange.parsed(self.steps, "monitor.memory.steps")

    @property
    def range(self) -> StepRange:
        return StepRange.parsed(self.steps, "monitor.memory.steps")


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileConfig:
    """Steps that are traced by torch's profiler."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    steps: int | str = "10-12"
    """One step or several. The one before warms the profiler up and is slower too; the others are not."""
    ranks: tuple[int, ...] | None = None
    """Those that write a trace; null: all of them."""
    with_stack: bool = False
    """Whether each operator is told with its line of Python: traces grow several times, and so does the time."""

    def __post_init__(self) -> None:
        StepRange.parsed(self.steps, "monitor.profile.steps")
        if self.ranks is not None and (not self.ranks or min(self.ranks) < 0):
            raise ConfigError(
                f"monitor.profile.ranks is {list(self.ranks)}; name ranks from 0 on, or leave it out for all of them."
            )

    @property
    def range(self) -> StepRange:
        return StepRange.parsed(self.steps, "monitor.profile.steps")


def refuse_overlap(memory: MemoryConfig | None, profile: ProfileConfig | None) -> None:
    """ConfigError where one step is to be looked at by both: torch has one profiler at a time."""
    if memory is None or profile is None:
        return
    first, last = profile.range.first, profile.range.last
    if memory.range.first <= last and first - 1 <= memory.range.last:
        raise ConfigError(
            f"monitor.memory.steps is {memory.range} and monitor.profile.steps {profile.range}, whose profiler warms "
            f"up in step {max(first - 1, 1)}: torch has one profiler at a time. Let one of them look at later steps."
        )
