"""Run a script on several ranks under torchrun, and read what its first rank found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def environment() -> dict[str, str]:
    """One thread a rank, everywhere alike; DeepSpeed is told to stay on the processor."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}


def run_ranks(
    script: str,
    nproc: int,
    arguments: Sequence[str],
    *,
    timeout_seconds: float = 1200,
    also: Mapping[str, str] | None = None,
) -> Any:
    """What rank 0 of `script --answer FILE arguments` left in FILE, as JSON; `also` is set in their environment.

    What ranks print is shown only if they fail: libraries are chatty.
    """
    with tempfile.TemporaryDirectory(prefix="trainfleet-bench-") as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}"]
        command += [script, *arguments, "--answer", str(answer)]
        surroundings = {**environment(), **(also or {})}
        done = subprocess.run(command, env=surroundings, capture_output=True, text=True, timeout=timeout_seconds)
        if done.returncode or not answer.exists():
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
        return json.loads(answer.read_text())
