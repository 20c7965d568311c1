"""The end of a run whose last checkpoint failed: said by all ranks, with what there is to go on from."""

from __future__ import annotations

from trainfleet.checkpoint import Checkpointer
from trainfleet.comm.group import Group
from trainfleet.errors import CheckpointError, NotSaved, StoreError


def refuse_unsaved_end(
    checkpointer: Checkpointer, group: Group, step: int, failed: CheckpointError | StoreError | None
) -> None:
    """NotSaved, on all ranks alike, if any of them `failed` to save where the run ended."""
    told = group.exchange(None if failed is None else [str(failed), failed.hint])
    failures = [each for each in told if each is not None]
    if failures:
        reason, hint = failures[0]
        raise NotSaved(
            f"The run ended after step {step}, but its last checkpoint failed: {reason.rstrip('.')}. "
            f"{_newest(checkpointer)}",
            hint=hint,
        )


def _newest(checkpointer: Checkpointer) -> str:
    try:
        steps = checkpointer.steps()
    except StoreError as error:
        return f"Whether there is an older one cannot be seen: {error}"
    if not steps:
        return "There is no older one, so nothing of this run is saved."
    return f"The newest one is that of step {steps[-1]}, {checkpointer.place(steps[-1])}."
