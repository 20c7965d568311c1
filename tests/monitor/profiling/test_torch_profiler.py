"""torch's profiler records what is asked, says nothing itself, and refuses a second one."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("torch")

PROGRAM = """
import torch
from trainfleet.monitor.profiling.torch_profiler import new_profiler
with new_profiler() as profiler:
    torch.ones(3) + 1
    try:
        new_profiler()
    except RuntimeError as error:
        print(error)
print(sum(event.name == "aten::add" for event in profiler.events()))
"""


def test_it_is_quiet_and_alone() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "another profiler of torch runs, and it has one at a time.\n1\n"
    assert "USDT" not in done.stderr
