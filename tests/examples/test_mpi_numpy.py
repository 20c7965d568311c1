"""The NumPy example has the losses of one process in every mode, on 1, 2 and 4 ranks, and never sees torch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mpi4py", reason="MPI is not installed: pip install 'trainfleet[mpi]'")
pytest.importorskip("sklearn", reason="the example trains on scikit-learn's digits")

ROOT = Path(__file__).parents[2]
MPIEXEC = Path(sys.executable).parent / "mpiexec"
PROGRAM = """
import runpy, sys
sys.argv = ["examples/mpi_numpy.py", *sys.argv[1:]]
runpy.run_path(sys.argv[0], run_name="__main__")
assert "torch" not in sys.modules, "torch was imported"
"""
pytestmark = pytest.mark.cluster


def run(ranks: int, *options: str) -> subprocess.CompletedProcess[str]:
    start = [str(MPIEXEC), "-n", str(ranks)] if ranks > 1 else []
    return subprocess.run(
        [*start, sys.executable, "-c", PROGRAM, *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def losses(ranks: int, *options: str) -> tuple[float, float]:
    done = run(ranks, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(rf"rank 0 of {ranks}\): loss ([\d.]+) at first, ([\d.]+) at the end", done.stdout)
    assert found, done.stdout
    return float(found[1]), float(found[2])


@pytest.fixture(scope="module")
def alone() -> tuple[float, float]:
    first, last = losses(1)
    assert last < 0.3 < first
    return first, last


TWO = ["", "--tp 2", "--pp 2", "--zero 1", "--zero 2", "--zero 3"]
FOUR = [
    "",
    "--tp 4",
    "--pp 4",
    "--zero 1",
    "--zero 2",
    "--zero 3",
    "--tp 2 --zero 3",
    "--tp 2 --pp 2",
    "--pp 2 --zero 2",
]
SOON = [(2, ""), (2, "--pp 2"), (4, "--tp 2 --zero 3")]
LATER = [(ranks, mode) for ranks, modes in ((2, TWO), (4, FOUR)) for mode in modes if (ranks, mode) not in SOON]


@pytest.mark.parametrize(
    ("ranks", "options"), [*SOON, *(pytest.param(*case, marks=pytest.mark.matrix) for case in LATER)]
)
def test_every_mode_has_the_losses_of_one_process(alone: tuple[float, float], ranks: int, options: str) -> None:
    assert losses(ranks, *options.split()) == pytest.approx(alone, rel=2e-4)


def test_a_plan_that_does_not_fit_the_ranks_ends_all_of_them_with_a_sentence() -> None:
    done = run(2, "--tp", "3")
    assert done.returncode == 3, "the exit code of PlanError"
    assert "failed first: PlanError: plan.tp=3 does not divide the 2 processes" in done.stdout + done.stderr
