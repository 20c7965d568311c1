"""Course: in which order a run took its steps, with its rollbacks, as metrics.jsonl has it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from trainfleet.events import AnomalySeen, Restored, StepEnded
from trainfleet.monitor.jsonl import read_rows


@dataclass(kw_only=True)
class Course:
    """What a replay has to know of a run. One of which nothing was recorded went straight on, for all that is known."""

    losses: dict[int, list[float]] = field(default_factory=dict)
    """By step, in the order in which the run took it."""
    rolled_back: set[int] = field(default_factory=set)
    """Steps that were rolled back when the run first came to them."""
    _first: dict[int, int] = field(default_factory=dict)
    """By step, the row in which it was first come to."""
    _last: dict[int, int] = field(default_factory=dict)
    _rollbacks: list[tuple[int, int]] = field(default_factory=list)
    """(row, step that it went back to)."""

    @classmethod
    def of(cls, metrics: Path) -> Course:
        course = cls()
        if not metrics.is_file():
            return course
        for number, row in enumerate(read_rows(metrics)):
            event, step = row["event"], row.get("step")
            if event == StepEnded.__name__ and step is not None:
                course.losses.setdefault(step, []).append(float(row["loss"]))
                course._last[step] = number
                course._first.setdefault(step, number)
            elif event == AnomalySeen.__name__ and row.get("policy") == "rollback":
                if course._first.setdefault(row["step"], number) == number:
                    course.rolled_back.add(row["step"])
            elif event == Restored.__name__ and row.get("path") == "memory":
                course._rollbacks.append((number, row["step"]))
        return course

    def leads(self, saved: int, wanted: int) -> bool:
        """Whether the state after step `saved`, as it was left, goes on to step `wanted` as it was first come to.

        A rollback leaves batches out. One between the two must not have gone back to before `saved`, for its copy is
        not in the checkpoint; and none may lie between where `saved` came later, as a checkpoint that was taken anew.
        """
        if saved >= wanted:
            return False
        if saved not in self._last or wanted not in self._first:
            return True
        begin, end = self._last[saved], self._first[wanted]
        if begin <= end:
            return all(back >= saved for row, back in self._rollbacks if begin < row < end)
        return not any(end <= row < begin for row, _ in self._rollbacks)
