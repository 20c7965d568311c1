"""The costliest operators of traced steps, as a table for a person."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from trainfleet.monitor.profiling.allocations import MODULE, PHASE, Range
from trainfleet.monitor.profiling.memory_report import aligned
from trainfleet.monitor.units import readable_bytes

MOST = 30
"""Rows of the table."""
_FRAMES = (PHASE, MODULE, "ProfilerStep")


def operator_table(averages: Sequence[Any], *, steps: int) -> list[str]:
    """Rows of `torch.profiler.profile.key_averages()`: those with the most time of their own, a step.

    Time is that of the device where there is one beside the CPU. Memory is what an operator took and did not give back
    by itself, on the CPU and on the device.
    """
    operators = [each for each in averages if not each.key.startswith(_FRAMES)]
    on_device = any(each.self_device_time_total for each in operators)

    def own(each: Any) -> float:
        return float(each.self_device_time_total if on_device else each.self_cpu_time_total)

    whole = sum(own(each) for each in operators) or 1.0
    rows = [["operator", "self ms", "share", *["CPU ms"] * on_device, "calls", "memory"]]
    for each in sorted(operators, key=own, reverse=True)[:MOST]:
        memory = each.self_cpu_memory_usage + each.self_device_memory_usage
        rows.append(
            [
                each.key[:60],
                f"{own(each) / 1000 / steps:.3f}",
                f"{own(each) / whole:.1%}",
                *[f"{each.self_cpu_time_total / 1000 / steps:.3f}"] * on_device,
                f"{each.count / steps:g}",
                readable_bytes(memory / steps) if memory else "",
            ]
        )
    rest = sorted(operators, key=own, reverse=True)[MOST:]
    if rest:
        seconds = sum(own(each) for each in rest)
        blank = [""] * (len(rows[0]) - 3)
        rows.append([f"{len(rest)} others", f"{seconds / 1000 / steps:.3f}", f"{seconds / whole:.1%}", *blank])
    return aligned(rows)


def module_table(ranges: Sequence[Range], *, steps: int) -> list[str]:
    """Seconds on the CPU that the forward of modules took without those inside them, a step; numbers are gathered.

    A recomputation in backward counts too.
    """
    own: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    open_: list[Range] = []
    for range_ in sorted(ranges, key=lambda each: (each.begun, -each.ended)):
        while open_ and open_[-1].ended <= range_.begun:
            open_.pop()
        name = _gathered(range_)
        own[name] += range_.ended - range_.begun
        calls[name] += 1
        if open_:
            own[_gathered(open_[-1])] -= range_.ended - range_.begun
        open_.append(range_)
    whole = sum(own.values()) or 1.0
    rows = [["module (forward)", "self ms", "share", "calls"]]
    for name in sorted(own, key=lambda name: -own[name])[:MOST]:
        rows.append([name, f"{own[name] / 1e6 / steps:.3f}", f"{own[name] / whole:.1%}", f"{calls[name] / steps:g}"])
    return aligned(rows)


def _gathered(range_: Range) -> str:
    name = range_.name.removeprefix(MODULE)
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name) or "the model"
