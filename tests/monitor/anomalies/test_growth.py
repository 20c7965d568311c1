"""A leak is told, and what fills up, jumps once or shakes is not."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from trainfleet.events import RanksReported
from trainfleet.monitor.anomalies import Finding, Growth

GIB = 1 << 30


def found(memory: Callable[[int], float], reports: int = 400, ranks: int = 2) -> list[Finding]:
    """Of reports each 10 steps of ranks, the last of which holds so many GiB."""
    growth = Growth(share=0.1)
    findings = []
    for i in range(reports):
        sizes = [GIB] * (ranks - 1) + [int(memory(i) * GIB)]
        each = [{"device": "cpu", "memory_bytes": 0, "private_bytes": size} for size in sizes]
        findings.append(growth.hear(RanksReported(step=10 * (i + 1), steps=10, ranks=each)))
    return [finding for finding in findings if finding is not None]


def test_a_leak_is_told_once_with_its_rank_and_rate() -> None:
    (finding,) = found(lambda i: 1 + 0.01 * i)
    assert finding.rank == 1 and finding.what.startswith("The memory of rank 1 grows by 1 MB a step, for 390 steps")


def test_a_slow_leak_is_told_too() -> None:
    (finding,) = found(lambda i: 1 + 0.0004 * i, reports=1000)
    assert finding.rank == 1 and "for 6240 steps" in finding.what


def test_a_leak_that_ends_is_over() -> None:
    begun, over = found(lambda i: 1 + 0.01 * min(i, 100))
    assert not begun.is_over and over.is_over and over.what.startswith("The memory of rank 1 has stopped growing")


CALM: dict[str, Callable[[int], float]] = {
    "constant": lambda i: 1,
    "a cache that fills up": lambda i: 1 + 3 * (1 - math.exp(-i / 10)),
    "an evaluation": lambda i: 1 if i < 100 else 1.5,
    "some evaluations": lambda i: 1 + 0.2 * (i > 20) + 0.2 * (i > 70) + 0.2 * (i > 200),
    "noise": lambda i: 1 + 0.3 * random.Random(i).random(),
    "a peak that rises ever less": lambda i: 1 + 0.05 * math.log1p(i),
    "waves": lambda i: 1 + 0.3 * math.sin(i / 6),
    "falling": lambda i: 5 - 0.01 * i,
}


@pytest.mark.parametrize("name", CALM)
def test_a_clean_run_tells_nothing(name: str) -> None:
    assert [each for each in found(CALM[name], reports=1000) if not each.is_over] == []


def test_the_memory_of_a_gpu_is_watched_too_and_named() -> None:
    growth = Growth(share=0.1)
    ranks = [{"device": "cuda:0", "private_bytes": GIB, "memory_bytes": GIB + (i << 24)} for i in range(60)]
    found = [growth.hear(RanksReported(step=i, steps=1, ranks=[each])) for i, each in enumerate(ranks)]
    (finding,) = [each for each in found if each is not None]
    assert finding.what.startswith("The memory of cuda:0 of rank 0 grows by 17 MB a step")
