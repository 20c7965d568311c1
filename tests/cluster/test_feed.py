"""Feeders in processes of their own, as a person starts them: killed, started again, set up wrongly."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from feeding import FeederProcess, read_job, write_job  # noqa: E402

from trainfleet.errors import DataError  # noqa: E402
from trainfleet.training import job  # noqa: E402
from trainfleet.training.feed import as_fed  # noqa: E402


def losses(folder: str | Path) -> list[float]:
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["event"] in ("StepEnded", "Evaluated")]


def same(one: str, other: str) -> bool:
    ours, theirs = (torch.load(Path(folder) / "end.pt") for folder in (one, other))
    return losses(one) == losses(other) and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_feeders_that_are_killed_and_started_again_cost_nothing(tmp_path: Path) -> None:
    path = write_job(tmp_path, train={"steps": 120, "evaluate_every": 60}, checkpoint={"every": None})
    local, over = (read_job(path, f"folder={tmp_path / name}") for name in ("local", "fed"))
    job.run(local)
    with (
        FeederProcess(path, "--listen", "127.0.0.1:0") as first,
        FeederProcess(path, "--listen", "127.0.0.1:0") as other,
    ):
        places = [first.reached_by, other.reached_by]
        training = threading.Thread(target=job.run, args=[as_fed(over, feeders=places)])
        training.start()
        first.find(r"(is here)")
        metrics = Path(over.folder) / "metrics.jsonl"
        while not metrics.exists() or metrics.read_text().count("StepEnded") < 20:
            time.sleep(0.01)
        for feeder in (first, other):
            feeder.stop(signal.SIGKILL)
        with FeederProcess(path, "--listen", places[0]) as again:
            again.find(r"(is here)")
            training.join(60)
            assert not training.is_alive()
            assert again.stop() == 0
    assert same(local.folder, over.folder)


def test_a_feeder_with_other_data_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_job(tmp_path)
    recipe = read_job(path, f"folder={tmp_path / 'fed'}", "train.steps=5")
    with (
        FeederProcess(path, "--listen", "127.0.0.1:0") as right,
        FeederProcess(path, "--listen", "127.0.0.1:0", "data.args={shift: 1.0}") as wrong,
        contextlib.suppress(DataError),  # two streams of a rank began with different feeders: refused at the start
    ):
        places = [right.reached_by, wrong.reached_by]
        assert job.run(as_fed(recipe, feeders=places)).reason == "finished"
    assert "makes other samples for training than those before it" in caplog.text


@pytest.mark.matrix
@pytest.mark.parametrize("nproc", [1, 2])
def test_the_command_trains_over_two_feeders_as_on_its_own(tmp_path: Path, nproc: int) -> None:
    path = write_job(tmp_path)
    command = [sys.executable, "-m", "trainfleet.cli.main", "train", str(path), "--nproc", str(nproc), "plan.zero=2"]

    def run(name: str, *more: str) -> str:
        folder = str(tmp_path / name)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, f"folder={folder}", *more], capture_output=True, text=True, timeout=120, env=environment
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return folder

    with (
        FeederProcess(path, "--listen", "127.0.0.1:0", "data.workers=1") as one,
        FeederProcess(path, "--listen", "127.0.0.1:0") as other,
    ):
        local = run("local")
        over = run("fed", "--feed", one.reached_by, "--feed", other.reached_by)
        assert one.stop() == 0 and other.stop(signal.SIGINT) == 0
    assert same(local, over)
