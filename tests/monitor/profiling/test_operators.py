from __future__ import annotations

from types import SimpleNamespace

from trainfleet.monitor.profiling.allocations import Range
from trainfleet.monitor.profiling.operators import MOST, module_table, operator_table


def row(key: str, own: float, *, device: float = 0.0, count: int = 2, memory: int = 0) -> SimpleNamespace:
    return SimpleNamespace(
        key=key,
        self_cpu_time_total=own,
        self_device_time_total=device,
        count=count,
        self_cpu_memory_usage=memory,
        self_device_memory_usage=0,
    )


def test_the_costliest_come_first_a_step_and_ranges_of_ours_are_no_operators() -> None:
    lines = operator_table([row("add", 1000), row("mm", 3000, memory=4000), row("phase: forward", 9e9)], steps=2)
    assert [line.split()[0] for line in lines] == ["operator", "mm", "add"]
    assert lines[1].split() == ["mm", "1.500", "75.0%", "1", "2", "kB"]


def test_beyond_the_table_the_rest_is_one_row_and_a_device_decides_where_there_is_one() -> None:
    lines = operator_table([row(f"op{i}", 10, device=i + 1) for i in range(MOST + 3)], steps=1)
    assert lines[1].startswith(f"op{MOST + 2}") and lines[-1].startswith("3 others")


def test_a_module_has_the_time_that_those_inside_it_have_not() -> None:
    ms = 1_000_000
    ranges = [
        Range("module: ", 0, 10 * ms),
        Range("module: blocks.0", 1 * ms, 4 * ms),
        Range("module: blocks.1", 5 * ms, 9 * ms),
    ]
    lines = module_table(ranges, steps=1)
    assert lines[1].split() == ["blocks.*", "7.000", "70.0%", "2"]
    assert lines[2].split() == ["the", "model", "3.000", "30.0%", "1"]
