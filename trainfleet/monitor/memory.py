"""How much memory this process holds, cheap enough to ask at every step."""

from __future__ import annotations

import os
import sys

import psutil

_process: psutil.Process | None = None


def resident_bytes() -> int:
    """Main memory of this process that is in use now (about 10 microseconds)."""
    global _process
    if _process is None or _process.pid != os.getpid():  # a forked child asks for itself
        _process = psutil.Process()
    return int(_process.memory_info().rss)


def used_bytes(device: str = "cpu") -> int:
    """What `StepEnded.memory_bytes` reports: resident memory, or the peak allocation of a CUDA device so far."""
    if device.startswith("cuda"):
        torch = sys.modules.get("torch")  # a process that uses CUDA has imported it
        if torch is not None and torch.cuda.is_initialized():
            return int(torch.cuda.max_memory_allocated(device))
    return resident_bytes()
