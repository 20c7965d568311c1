"""Copies of a process that has imported are children of their launcher, and outlive what they were copied from."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from trainfleet.training.ranks import copies
from trainfleet.training.ranks.copies import CAN_COPY, NoCopies, Preloaded

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(not CAN_COPY, reason="the system copies no processes")]

OWN = """
import os, sys, time
open(sys.argv[1], "w").write(os.environ["OMP_NUM_THREADS"])
if sys.argv[2] == "wait":
    time.sleep(60)
sys.exit(int(sys.argv[2]))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def run(preloaded: Preloaded, folder: Path, what: str, name: str = "said") -> copies.Copy:
    environment = {**os.environ, "OMP_NUM_THREADS": "3"}
    return preloaded.copy("own", [str(folder / name), what], environment, name="rank 0")


def came(path: Path) -> bool:
    ends = time.monotonic() + 30
    while not path.exists() and time.monotonic() < ends:
        time.sleep(0.01)
    return path.exists()


def test_the_exit_code_of_a_copy_is_that_of_its_module_and_it_can_be_waited_for(folder):
    with Preloaded(["json"], threads=2) as preloaded:
        began = time.monotonic()
        copy = run(preloaded, folder, "wait")
        with pytest.raises(subprocess.TimeoutExpired):
            copy.wait(0.1)
        assert copy.poll() is None and psutil.Process(copy.pid).ppid() == os.getpid()
        os.killpg(copy.pid, signal.SIGKILL)
        assert copy.wait(10) == copy.poll() == -signal.SIGKILL
        assert run(preloaded, folder, "7").wait(10) == 7
        assert run(preloaded, folder, "0").wait(10) == 0
        assert time.monotonic() - began < 20
    assert (folder / "said").read_text() == "3"


def test_it_imports_with_its_share_of_the_cores(folder, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (folder / "at_import.py").write_text(
        f"import os; open({str(folder / 'share')!r}, 'w').write(os.environ['OMP_NUM_THREADS'])"
    )
    with Preloaded(["at_import"], threads=2) as preloaded:
        assert run(preloaded, folder, "0").wait(10) == 0
    assert (folder / "share").read_text() == "2"
    assert "OMP_NUM_THREADS" not in os.environ


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_what_ends_the_process_leaves_its_copies_alone_and_the_next_copy_is_of_another(folder, number, capfd):
    with Preloaded(["json"], threads=None) as preloaded:
        copy = run(preloaded, folder, "wait", "first")
        assert came(folder / "first")
        (origin,) = [each for each in psutil.Process().children() if preloaded_is(each)]
        origin.send_signal(number)
        origin.wait(10)
        assert run(preloaded, folder, "7", "second").wait(20) == 7
        assert copy.poll() is None
        os.kill(copy.pid, signal.SIGKILL)
        copy.wait(10)
    assert not [each for each in psutil.Process().children() if preloaded_is(each)]
    assert capfd.readouterr().err == ""


def preloaded_is(process: psutil.Process) -> bool:
    return "trainfleet.training.ranks.preload" in process.cmdline() and not process.name().startswith("rank")


def test_a_process_that_ends_while_it_imports_is_no_copy_but_says_so(folder):
    (folder / "dies.py").write_text("import os; os._exit(3)")
    with Preloaded(["dies"], threads=None) as preloaded:
        for _ in range(2):
            with pytest.raises(NoCopies, match="did not answer"):
                run(preloaded, folder, "0")


def test_a_process_that_hangs_is_given_up(folder, monkeypatch):
    monkeypatch.setattr(copies, "_COPIES_WITHIN_SECONDS", 0.5)
    with Preloaded(["json"], threads=None) as preloaded:
        run(preloaded, folder, "0").wait(10)
        (origin,) = [each for each in psutil.Process().children() if preloaded_is(each)]
        origin.suspend()
        with pytest.raises(NoCopies, match="TimeoutError"):
            run(preloaded, folder, "0")
        assert not origin.is_running()
        assert run(preloaded, folder, "0").wait(10) == 0


def test_where_nothing_can_be_copied_nothing_is_started(folder, monkeypatch):
    monkeypatch.setattr(copies, "CAN_COPY", False)
    before = len(psutil.Process().children())
    with Preloaded(["json"], threads=None) as preloaded, pytest.raises(NoCopies):
        assert len(psutil.Process().children()) == before
        run(preloaded, folder, "0")


def test_a_process_that_is_not_ours_is_refused():
    with pytest.raises(ConnectionError, match="no child of this one"):
        copies.Copy(1)


def test_closing_ends_the_process_also_while_it_imports(folder):
    (folder / "slow.py").write_text("import time; time.sleep(60)")
    preloaded = Preloaded(["slow"], threads=None)
    (origin,) = [each for each in psutil.Process().children() if preloaded_is(each)]
    began = time.monotonic()
    preloaded.close()
    preloaded.close()
    assert not origin.is_running() and time.monotonic() - began < 5


def test_all_that_ranks_are_to_find_imported_can_be_imported():
    pytest.importorskip("torch", reason="ranks need torch")
    from trainfleet.cli.train import FOR_RANKS

    assert [name for name in FOR_RANKS if importlib.util.find_spec(name) is None] == []
