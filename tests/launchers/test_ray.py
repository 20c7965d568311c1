"""On a local Ray a run has the losses of a plain one, and what Ray cannot give is said in words."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest
from small_job import Job

from trainfleet.deps import installed

pytestmark = pytest.mark.cluster
needs_ray = pytest.mark.skipif(
    installed("ray") is None, reason="Ray is not installed (a wheel of 80 MB): pip install 'trainfleet[ray]'"
)
RAY = ["trainfleet", "launch", "ray", "recipe.yaml"]


@needs_ray
@pytest.mark.matrix
def test_two_processes_of_an_actor_train_as_two_plain_ones_do(job: Job, plain: dict[int, float]) -> None:
    said = job.run([*RAY, "--nproc-per-node", "2", "--cpus-per-rank", "0.5", "monitor.console=true"], seconds=180)
    assert job.losses() == plain
    assert "[host 0] " in said and "6/6" in said


@needs_ray
@pytest.mark.matrix
def test_ctrl_c_has_the_run_saved_and_ended(job: Job) -> None:
    process = job.start([*RAY, "--cpus-per-rank", "0.5", "data.source=learner:Slow", "train.steps=400"])
    ends = time.monotonic() + 120
    while not (job.folder / "run" / "metrics.jsonl").exists() or not job.losses():
        assert process.poll() is None and time.monotonic() < ends, process.communicate()[0]
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert list((job.folder / "run" / "checkpoints").glob("step-*")), said


@needs_ray
@pytest.mark.matrix
def test_a_rank_that_fails_is_told_with_its_code(job: Job) -> None:
    process = job.start(
        [*RAY, "--nproc", "2", "--cpus-per-rank", "0.5", "data.source=learner:Breaks", "train.steps=50"]
    )
    said, _ = process.communicate(timeout=180)
    assert process.returncode not in (0, None)
    assert "sample 13 is rotten" in said and "trainfleet: The run failed on host 0 with exit code" in said


@needs_ray
@pytest.mark.matrix
def test_what_the_cluster_has_no_room_for_is_told(job: Job) -> None:
    process = job.start([*RAY, "--gpus-per-rank", "99", "--wait", "3"])
    said, _ = process.communicate(timeout=180)
    assert process.returncode == 8
    assert "trainfleet: Ray has no room for 1 hosts with {'CPU': 1.0, 'GPU': 99.0} each within 3 s" in said


def test_without_ray_one_sentence_names_the_extra(job: Job) -> None:
    program = "import sys; sys.modules['ray'] = None; from trainfleet.cli.main import main; main(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", program, "launch", "ray", "recipe.yaml", "--no-check"],
        cwd=job.folder,
        env=job.env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 4
    assert '`trainfleet launch ray` needs the extra: pip install "trainfleet[ray]".' in done.stderr
