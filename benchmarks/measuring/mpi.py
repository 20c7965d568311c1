"""Run a script on several ranks under mpiexec, and read what its first rank found."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measuring.ranks import environment

MPIEXEC = Path(sys.executable).parent / "mpiexec"


def run_under_mpiexec(script: str, size: int, arguments: Sequence[str], *, timeout_seconds: float = 1200) -> Any:
    """What rank 0 of `script --answer FILE arguments` left in FILE, as JSON."""
    with tempfile.TemporaryDirectory(prefix="trainfleet-bench-") as folder:
        answer = Path(folder) / "answer.json"
        command = [str(MPIEXEC), "-n", str(size), sys.executable, script, *arguments, "--answer", str(answer)]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=timeout_seconds)
        if done.returncode or not answer.exists():
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
        return json.loads(answer.read_text())
