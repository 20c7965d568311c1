"""torch's profiler, of which one runs at a time; ours, without its remarks on standard error."""

from __future__ import annotations

import os
from typing import Any


def new_profiler(*, with_stack: bool = False, of_devices: bool = False) -> Any:
    """A `torch.profiler.profile` that records operators, their shapes and memory, not started yet.

    RuntimeError where another one runs already. With `of_devices` it records what GPUs do too.
    """
    import torch
    from torch.autograd import _profiler_enabled  # type: ignore[attr-defined]
    from torch.profiler import ProfilerActivity, profile

    if _profiler_enabled():
        raise RuntimeError("another profiler of torch runs, and it has one at a time.")
    # Kineto, which reads this where it is used first, says at each start and stop that it does so.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    activities = [ProfilerActivity.CPU]
    if of_devices and torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    return profile(activities=activities, profile_memory=True, record_shapes=True, with_stack=with_stack)
