"""Every program of docs/coming-from.md that is ours runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "coming-from.md").read_text()
PROGRAMS = re.findall(r"### (.+?)\n(?:(?!### ).)*?```python\n# ours(, under mpiexec)?\n(.*?)```", PAGE, flags=re.DOTALL)


def test_every_pair_has_a_program_of_ours() -> None:
    assert len(PROGRAMS) == PAGE.count("### ") == PAGE.count("```python") // 2


@pytest.mark.parametrize(("title", "program"), [(title, text) for title, mpi, text in PROGRAMS if not mpi])
def test_it_runs(title: str, program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "examples")
    exec(compile(program, f"docs/coming-from.md, {title}", "exec"), {"__name__": "__main__"})


def test_those_over_mpi_run_on_two_ranks(tmp_path: Path) -> None:
    pytest.importorskip("mpi4py", reason="MPI is not installed: pip install 'trainfleet[mpi]'")
    programs = [text for _, mpi, text in PROGRAMS if mpi]
    runner = f"for program in {programs!r}: exec(program, {{'__name__': '__main__'}})"
    mpiexec = Path(sys.executable).with_name("mpiexec")
    run = subprocess.run(
        [mpiexec, "-n", "2", sys.executable, "-c", runner], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
