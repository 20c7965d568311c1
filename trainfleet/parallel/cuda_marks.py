"""CudaMarks: moments of a GPU, as events in the queue of its current stream."""

from __future__ import annotations

from typing import Any

import torch

from trainfleet.stopwatch import DeviceStopwatch, Stopwatch


class CudaMarks:
    """`stopwatch.Marks` of one GPU. Collectives that the stream waits for end between two marks as kernels do."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._free: list[Any] = []  # events are used again: to make one takes longer than to record it

    def mark(self) -> Any:
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, earlier: Any, later: Any) -> float | None:
        if not later.query():
            return None
        passed = float(earlier.elapsed_time(later)) / 1e3
        self._free.append(earlier)
        return passed


def stopwatch_for(device: str) -> Stopwatch:
    """The one for a rank that computes on `device`."""
    return DeviceStopwatch(CudaMarks(device)) if torch.device(device).type == "cuda" else Stopwatch()
