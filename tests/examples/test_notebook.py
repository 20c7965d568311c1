"""The notebook runs from its first line to its last, fed by the line that it prints, through a tunnel by ssh.

Its one cell is run as a program of its own, which is what a kernel would do with it; the host between is a real server
of ssh on this one, and the line is run as it was printed, in a process of its own.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from ssh_host import ssh_in_path

pytest.importorskip("torch", reason="the notebook trains with torch")
pytest.importorskip("sklearn", reason="the notebook trains on scikit-learn's digits")
pytest.importorskip("cryptography", reason="what goes through a tunnel needs TLS, and so the extra `net`")

ROOT = Path(__file__).parents[2]
AT_HOME = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
NOTEBOOK = ROOT / "notebooks/colab_gpu.ipynb"


def code_cells() -> list[str]:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_a_notebook_holds_one_cell_of_code_and_no_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert len(code_cells()) == 1
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in cells)


def test_the_notebook_is_fed_by_the_line_that_it_prints(tmp_path: Path) -> None:
    (tmp_path / "cell.py").write_text(code_cells()[0])
    with ssh_in_path(tmp_path) as environment:
        environment |= {"TUNNEL": "ssh:me@127.0.0.1", "OMP_NUM_THREADS": "1"}
        gpu = subprocess.Popen(
            [sys.executable, "-u", "cell.py"],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        assert gpu.stdout is not None
        limit = threading.Timer(120, os.killpg, (gpu.pid, signal.SIGKILL))
        limit.start()
        home, said = None, ""
        try:
            for line in gpu.stdout:
                said += line
                if line.startswith("  trainfleet feed "):
                    home = subprocess.Popen(shlex.split(line), cwd=ROOT, env=AT_HOME, start_new_session=True)
            assert gpu.wait(30) == 0, said
            assert home is not None, said
            home.send_signal(signal.SIGINT)
            assert home.wait(30) == 0
        finally:
            limit.cancel()
            for process in (gpu, home):
                if process is not None and process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            gpu.stdout.close()
    assert "is gone" not in said, "the two part in order"
    assert "Run this at home, where the data are:" in said
    losses = [float(loss) for loss in re.findall(r"^step.*? loss ([\d.]+)", said, re.MULTILINE)]
    assert len(losses) >= 6 and losses[-1] < losses[0] / 4, said
    ended = re.search(r"finished on cpu: loss [\d.]+, held out ([\d.]+)", said)
    assert ended is not None and float(ended[1]) < 0.15, said
