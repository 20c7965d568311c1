from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from trainfleet.deps import installed
from trainfleet.doctor.torch_trial import NUM_BYTES

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(installed("torch") is None, reason="a collective needs torch"),
]


def tried(program: str, **variables: str) -> list[dict[str, object]]:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, env={**os.environ, **variables}
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_two_ranks_really_sum_and_failures_and_hangs_are_answers_that_leave_no_process():
    """In one process, as the import of torch is what takes long."""
    program = """
import json, os, time, psutil
from trainfleet.doctor import torch_trial
print(json.dumps(torch_trial.try_collective("gloo", 2)))
print(json.dumps(torch_trial.try_collective("nonsense", 2)))
torch_trial._sum = lambda *given: 1 / 0
print(json.dumps(torch_trial.try_collective("gloo", 2)))
torch_trial._sum = lambda backend, rank, *given: time.sleep(60) if rank else 0.1
begun = time.monotonic()
said = torch_trial.try_collective("gloo", 2, patience=0.2)
print(json.dumps({**said, "seconds": time.monotonic() - begun}))
torch_trial._sum = lambda backend, rank, *given: os._exit(3) if rank else 0.1
print(json.dumps(torch_trial.try_collective("gloo", 2)))
print(json.dumps({"left": len(psutil.Process().children(recursive=True))}))
"""
    summed, unknown, error, hang, death, left = tried(program)
    assert (summed["backend"], summed["size"], summed["bytes"]) == ("gloo", 2, NUM_BYTES)
    assert 0 < summed["seconds"] < 60 and "error" not in summed
    assert "nonsense" in str(unknown["error"]).lower()
    assert error["error"] == "ZeroDivisionError: division by zero"
    assert hang["error"] == "rank 1 gave no answer in 0.2 s" and hang["seconds"] < 20
    assert death["error"] == "rank 1 died without a word"
    assert left == {"left": 0}
