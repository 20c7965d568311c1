"""The numbers of an event under the names by which people find them in TensorBoard, W&B and MLflow."""

from __future__ import annotations

from trainfleet.events import CheckpointSaved, Evaluated, Event, RanksReported, StepEnded, Tracked


def scalars_in(event: Event, *, every: int = 1) -> tuple[int, dict[str, float]] | None:
    """(step, numbers by name), where the event has any; of steps, each `every`-th."""
    if isinstance(event, StepEnded):
        return (event.step, _of_step(event)) if event.step % every == 0 else None
    if isinstance(event, Evaluated):
        metrics = {"loss": event.loss, **event.metrics}
        return event.step, {f"validation/{name}": value for name, value in metrics.items()}
    if isinstance(event, Tracked):
        return event.step, {event.name: event.value}
    if isinstance(event, CheckpointSaved):
        return event.step, {"time/save_seconds": event.seconds}
    if isinstance(event, RanksReported):
        return event.step, _of_machines(event)
    return None


def _of_step(event: StepEnded) -> dict[str, float]:
    values = {
        "train/loss": event.loss,
        "train/learning_rate": event.learning_rate,
        "speed/tokens_per_second": event.tokens / event.seconds if event.seconds else 0.0,
        "speed/samples_per_second": event.samples / event.seconds if event.seconds else 0.0,
        "time/step_seconds": event.seconds,
        "time/data_seconds": event.data_seconds,
        "memory/bytes": event.memory_bytes,
    }
    values |= {f"time/{phase}_seconds": seconds for phase, seconds in event.phases.items() if seconds}
    if event.mfu is not None:
        values["speed/mfu"] = event.mfu
    values |= {f"time/wait_{cause}_seconds": seconds for cause, seconds in event.waits.items() if seconds}
    if event.grad_norm is not None:
        values["train/grad_norm"] = event.grad_norm
    if event.loss_scale is not None:
        values["train/loss_scale"] = event.loss_scale
    return values


def _of_machines(event: RanksReported) -> dict[str, float]:
    """By host; those of a process by its rank too, where there are several."""
    numbers = {}
    for rank, each in enumerate(event.ranks):
        for name, value in each.get("system", {}).items():
            of_process = name.startswith("process_") and len(event.ranks) > 1
            numbers[f"system/{each['host']}/{f'rank{rank}/' * of_process}{name}"] = value
    return numbers
