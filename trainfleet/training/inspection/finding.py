"""Finding: the first module that produced something that is not finite, and the samples that it arose from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias, get_args

from trainfleet.training.inspection.values import Values

Kind: TypeAlias = Literal[
    "batch", "parameter", "buffer", "module", "code", "loss", "backward", "exchange", "norm", "not_again", "unseen"
]
"""batch: it came with the data. parameter, buffer: one held it before the step. module: the output of one. code: of a
module that calls others, between them. loss: the loss function. backward: the gradient of one of these. exchange: the
sum of gradients over micro-batches or ranks. norm: the sum of squares alone. not_again: run again, the step was finite.
unseen: nothing that was looked at held it."""
Phase: TypeAlias = Literal["data", "forward", "loss", "backward", "exchange", "norm", "before"]

MOST_SAMPLES = 64
"""Samples that are named; further ones are counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What made a step's loss or gradient not finite."""

    step: int
    kind: Kind
    phase: Phase
    """Where it arose; before: in the update of the step before."""
    rank: int
    """On which it arose first."""
    ranks: tuple[int, ...] = ()
    """Those that saw it arise from what they computed; the others were clean, or got it from these."""
    module: str | None = None
    """The first that produced it, by its name in the model; empty for the model itself, None for none."""
    tensor: str = ""
    """Which of its tensors, in words."""
    what: str
    """A sentence without its full stop."""
    values: Values | None = None
    """Of that tensor, in the piece that the rank has."""
    micro_batch: int | None = None
    """Of the rank in this step, from 0."""
    rows: tuple[int, ...] = ()
    """Of that micro-batch; empty where that cannot be told."""
    samples: tuple[str, ...] = ()
    """What stands in these rows, at most MOST_SAMPLES of them."""
    indices: tuple[int, ...] = ()
    """Of these samples in the dataset, where they have any."""
    loss: float
    grad_norm: float
    seconds: float = 0.0
    """That the hunt took."""
    remarks: tuple[str, ...] = field(default_factory=tuple)
    path: str | None = None
    """Of the folder with what was saved for a replay."""

    def __str__(self) -> str:
        lines = [f"{self.what}."]
        if self.values is not None:
            lines.append(f"values   {self.values}")
        if self.samples:
            more = len(self.rows) - len(self.samples)
            rest = f"; and {more} more" if more > 0 else ""
            lines.append(f"samples  {'; '.join(self.samples[:8])}{'; …' if len(self.samples) > 8 else rest}")
        elif self.rows:
            lines.append(f"rows     {', '.join(map(str, self.rows[:16]))} of micro-batch {self.micro_batch}")
        lines.append(f"step     {self.step}: loss {self.loss:.6g}, norm of the gradient {self.grad_norm:.6g}")
        if self.path is not None:
            lines.append(f"saved    {self.path}")
        return "\n".join([*lines, *(f"note: {remark}" for remark in self.remarks)])

    def to_plain(self) -> dict[str, Any]:
        """For JSON, which has no NaN: figures that are not finite are words."""
        told = asdict(self)
        told["values"] = self.values.to_plain() if self.values is not None else None
        for name in ("loss", "grad_norm"):
            told[name] = plain_number(told[name])
        return told

    @classmethod
    def from_plain(cls, told: Mapping[str, Any]) -> Finding:
        """ValueError for what is no finding."""
        if not isinstance(told, Mapping) or told.get("kind") not in get_args(Kind):
            raise ValueError(f"it holds {str(told)[:60]!r} where a finding belongs")
        values = dict(told)
        values["values"] = Values.from_plain(told["values"]) if told.get("values") else None
        for name in ("ranks", "rows", "samples", "indices", "remarks"):
            values[name] = tuple(told.get(name) or ())
        for name in ("loss", "grad_norm"):
            values[name] = float(told[name])
        return cls(**values)


def plain_number(value: float) -> float | str:
    """As JSON can hold it: `nan`, `inf` and `-inf` as words."""
    return value if value - value == 0 else str(value)


def named(module: str | None) -> str:
    """A module in a sentence."""
    return module or "the model"


def told_ranks(guilty: Sequence[int], num_reached: int, world_size: int) -> str:
    """Which ranks it arose on, and how many it came to from there, as the end of a sentence; nothing for one rank."""
    if world_size == 1:
        return ""
    if len(guilty) == 1:
        where = f", on rank {guilty[0]}"
        if num_reached:
            return f"{where}, from which it came to {num_reached} other{'s' * (num_reached > 1)}"
        return f"{where} alone; the other{f' {world_size - 1}' * (world_size > 2)} computed what is finite"
    if len(guilty) == world_size:
        return f", on all {world_size} ranks"
    return f", on {len(guilty)} of {world_size} ranks, {guilty[0]} first"
