"""Ranks that are copies hear, say and end as ranks that are fresh interpreters; whatever is killed, nothing is left."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

pytest.importorskip("torch", reason="ranks are watched by torch's agent")

from torch.distributed.elastic.agent.server import local_elastic_agent
from torch.distributed.elastic.agent.server.api import Worker, WorkerGroup, WorkerSpec

from trainfleet.errors import RankFailed
from trainfleet.training.ranks.agent import Job, run_command
from trainfleet.training.ranks.copies import CAN_COPY, Preloaded
from trainfleet.training.ranks.processes import environments

pytestmark = pytest.mark.cluster
copied = pytest.mark.skipif(not CAN_COPY, reason="the system copies no processes")

OWN = """
import os, signal, sys, time
from pathlib import Path

place, what = Path(sys.argv[1]), sys.argv[2]
rank, start = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])

def done(word, text=""):
    unfinished = place / f"{word}-{rank}.new"
    unfinished.write_text(text)
    unfinished.rename(place / f"{word}-{rank}")

def save(number, frame):
    time.sleep(0.3)
    done("saved")
    sys.exit(0)

signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, save)
done(f"up{start}", repr((os.getpid(), "decimal" in sys.modules, os.environ["OMP_NUM_THREADS"])))
if what == "fail" and start == 0 and rank == 1:
    sys.exit(3)
if what == "wait" or start == 0:
    time.sleep(60)
"""

LAUNCHER = """
import sys
from trainfleet.training.ranks.launch import run_elastic
from trainfleet.training.ranks.copies import Preloaded

if __name__ == "__main__":
    with Preloaded(["decimal"], threads=1) as preloaded:
        command = [sys.executable, "-m", "own", *sys.argv[1:3]]
        sys.exit(run_elastic(command, nproc=2, max_restarts=int(sys.argv[3]), preloaded=preloaded))
"""


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    started: list[subprocess.Popen[str]] = []

    def start(what: str, restarts: int = 0) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
        """A launcher, and all that it has started once both ranks are up: where ranks come from, and the ranks."""
        command = [sys.executable, str(tmp_path / "launcher.py"), str(tmp_path), what, str(restarts)]
        launcher = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        started.append(launcher)
        came(tmp_path, "up0")
        found = psutil.Process(launcher.pid).children(recursive=True)
        return launcher, sorted(found, key=lambda process: (process.name().startswith("rank "), process.name()))

    yield start
    for process in started:
        process.kill()
        process.communicate()


def came(folder: Path, word: str) -> None:
    ends = time.monotonic() + 60
    while not all((folder / f"{word}-{rank}").exists() for rank in range(2)):
        assert time.monotonic() < ends, f"{word} does not come"
        time.sleep(0.01)


def gone(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, 10)[1]


@copied
@pytest.mark.parametrize(
    ("number", "to"),
    [
        (signal.SIGTERM, "all"),
        (signal.SIGINT, "group"),
        pytest.param(signal.SIGINT, "all", marks=pytest.mark.matrix),
        pytest.param(signal.SIGTERM, "group", marks=pytest.mark.matrix),
        pytest.param(signal.SIGTERM, "launcher", marks=pytest.mark.matrix),
        pytest.param(signal.SIGINT, "launcher", marks=pytest.mark.matrix),
    ],
)
def test_whoever_gets_a_signal_the_ranks_save_once_and_all_ends(start, tmp_path, number, to):
    launcher, below = start("wait")
    assert [process.name() for process in below[1:]] == ["rank 0", "rank 1"]
    if to == "group":  # as a terminal does
        os.killpg(launcher.pid, number)
    else:  # as SLURM does
        for process in [*(below if to == "all" else []), launcher]:
            process.send_signal(number)
    assert launcher.wait(30) == 128 + number
    came(tmp_path, "saved")
    assert gone(below)
    assert launcher.stderr.read() == ""


@copied
def test_all_die_with_a_killed_launcher(start, tmp_path):
    launcher, below = start("wait")
    assert len(below) == 3
    launcher.kill()
    assert gone(below)
    assert not (tmp_path / "saved-0").exists()


@copied
@pytest.mark.parametrize(
    "killed",
    [
        pytest.param([0, 1, 2], id="all"),
        pytest.param([1], id="rank 0", marks=pytest.mark.matrix),
        pytest.param([2], id="rank 1", marks=pytest.mark.matrix),
        pytest.param([1, 2], id="ranks", marks=pytest.mark.matrix),
    ],
)
def test_after_kills_the_ranks_start_anew_as_copies(start, tmp_path, killed):
    launcher, below = start("go on", restarts=1)
    for each in killed:
        below[each].kill()
    assert launcher.wait(30) == 0
    for rank in range(2):
        pid, imported, threads = eval((tmp_path / f"up1-{rank}").read_text())
        assert imported and threads == "1" and pid not in [process.pid for process in below]
    assert gone(below)


@copied
@pytest.mark.matrix
def test_a_killed_origin_harms_no_rank(start, tmp_path):
    launcher, below = start("wait")
    below[0].kill()
    time.sleep(0.3)
    assert all(rank.is_running() for rank in below[1:])
    launcher.terminate()
    assert launcher.wait(30) == 128 + signal.SIGTERM
    came(tmp_path, "saved")


@copied
def test_a_code_that_a_copy_ends_with_is_a_failure_with_its_number(start):
    launcher, _ = start("fail")
    assert "Rank 1 of 2" in (said := launcher.communicate(timeout=30)[1])
    assert "ended with exit code 3" in said


def test_where_nothing_can_be_copied_ranks_are_fresh_interpreters(tmp_path, monkeypatch, caplog):
    (tmp_path / "broken.py").write_text("import os; os._exit(1)")
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    caplog.set_level(logging.INFO)
    command = [sys.executable, "-m", "own", str(tmp_path), "fail"]
    with Preloaded(["broken"], threads=1) as preloaded, pytest.raises(RankFailed, match="exit code 3"):
        run_command(Job(nproc=2), command, threads=1, preloaded=preloaded)
    assert caplog.text.count("The ranks import everything anew") == 1
    assert eval((tmp_path / "up0-1").read_text())[1:] == (False, "1")


def test_ranks_hear_what_torchs_own_agent_tells_them(monkeypatch):
    told = {}
    monkeypatch.setattr(
        local_elastic_agent,
        "start_processes",
        lambda envs, **_: told.update(envs) or SimpleNamespace(pids=dict),
    )
    handler = SimpleNamespace(get_run_id=lambda: "a run", use_agent_store=True)
    spec = WorkerSpec(role="r", local_world_size=2, entrypoint="x", rdzv_handler=handler, max_restarts=5)
    group = WorkerGroup(spec)
    group.workers = [
        Worker(local_rank=i, global_rank=2 + i, role_rank=2 + i, world_size=4, role_world_size=4) for i in (0, 1)
    ]
    group.store, group.group_rank, group.group_world_size = object(), 1, 2
    group.master_addr, group.master_port = "host", 123
    agent = local_elastic_agent.LocalElasticAgent(spec, logs_specs=SimpleNamespace())
    agent._remaining_restarts = 3
    for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):  # which ranks inherit in any case
        monkeypatch.delenv(name, raising=False)
    agent._start_workers(group)
    assert environments(group, restarts=2) == told
