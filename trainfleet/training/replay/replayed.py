"""Replayed: what a step was when it was taken again, in words and for programs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from trainfleet.training.inspection import Finding
from trainfleet.training.inspection.finding import plain_number
from trainfleet.training.replay.anatomy import Part, table


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """A step, seen again."""

    step: int
    began: int
    """The step of the checkpoint that it went on from; 0 for none."""
    nproc: int
    loss: float
    grad_norm: float
    recorded: float | None
    """The loss that metrics.jsonl has for this step; None where it has none."""
    first_other: int | None
    """The first step on the way whose loss was not the recorded one; None where all were, or none is recorded."""
    parts: list[Part]
    finding: Finding | None
    remarks: tuple[str, ...] = field(default_factory=tuple)

    def lines(self) -> list[str]:
        """For a person."""
        begun = f"from the checkpoint of step {self.began}" if self.began else "from the begin of the run"
        processes = f"{self.nproc} process{'es' * (self.nproc != 1)}"
        lines = [f"step {self.step} again, {begun}, on {processes}", self.compared()]
        lines += [f"note: {remark}" for remark in self.remarks]
        lines += ["", *table(self.parts), ""]
        return [*lines, *(str(self.finding).splitlines() if self.finding else ["Everything in it was finite."])]

    def compared(self) -> str:
        """The loss beside that of the run."""
        line = f"loss {self.loss:.9g}, norm of the gradient {self.grad_norm:.6g}"
        if self.recorded is None:
            return f"{line}; the run has recorded no loss for it"
        if self.recorded == self.loss or (math.isnan(self.recorded) and math.isnan(self.loss)):
            return f"{line}; the run's loss, to the bit"
        way = "" if self.first_other is None else f"; the first step on the way to differ was {self.first_other}"
        off = abs(self.loss - self.recorded) / abs(self.recorded) if self.recorded else math.inf
        far = f", which is {off:.1e} off" if math.isfinite(off) else ""
        return f"{line}; the run's loss was {self.recorded:.9g}{far}{way}"

    def to_plain(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "began": self.began,
            "nproc": self.nproc,
            "loss": plain_number(self.loss),
            "grad_norm": plain_number(self.grad_norm),
            "recorded_loss": None if self.recorded is None else plain_number(self.recorded),
            "same_loss": "to the bit" in self.compared(),
            "first_other_step": self.first_other,
            "remarks": list(self.remarks),
            "finding": self.finding.to_plain() if self.finding else None,
            "modules": [part.to_plain() for part in self.parts],
        }
