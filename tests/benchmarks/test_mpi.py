"""The benchmarks over MPI run, and their tables say what they must."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mpi4py", reason="MPI is not installed: pip install 'trainfleet[mpi]'")

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.cluster


def tables(script: str, folder: Path) -> list[dict[str, Any]]:
    command = [sys.executable, f"benchmarks/{script}.py", "--quick", "--results", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return list(json.loads((folder / f"{script}.json").read_text())["tables"])


@pytest.mark.matrix
def test_averages_are_timed_beside_raw_sums(tmp_path: Path) -> None:
    large, small, overlap = tables("mpi_average", tmp_path)
    for table in (large, small):
        assert {row[0] for row in table["rows"]} >= {"raw Allreduce", "average_gradients"}
        assert "is asked for" in table["notes"][0]
    assert "of the averaging is hidden" in overlap["notes"][0]


@pytest.mark.matrix
def test_every_stage_holds_what_the_formula_says_and_loses_as_one_process(tmp_path: Path) -> None:
    (table,) = tables("mpi_zero", tmp_path)
    assert [row[0] for row in table["rows"]] == ["0", "1", "2", "3"]
    assert "is within 2% of the formula" in table["notes"][0]
    assert all(float(row[-1]) < 1e-10 for row in table["rows"])
