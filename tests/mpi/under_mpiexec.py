"""`mpiexec -n 2 python tests/mpi/under_mpiexec.py`: every rank runs every test of this folder; rank 0 reports."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if os.environ.get("PMI_RANK", "0") != "0":
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115  for as long as the process lives
    tests = sys.argv[1:] or [str(Path(__file__).parent)]
    sys.exit(pytest.main(["-q", "-x", "-m", "not matrix", "-p", "no:cacheprovider", *tests]))
