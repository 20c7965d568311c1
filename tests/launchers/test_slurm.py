"""The file for sbatch is one that sbatch takes, and what it does trains, saves before its time is over, and goes on."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import Cluster, missing
from small_job import Job, write_job

from trainfleet.errors import LaunchError
from trainfleet.launchers.command import Command
from trainfleet.launchers.slurm import Allocation, sbatch_script, seconds_of

COUNT = re.compile(r"\d+")
WORD = re.compile(r"[^\s,]+")
TIME = re.compile(r"\d+|\d+:\d+|\d+:\d+:\d+|\d+-\d+|\d+-\d+:\d+|\d+-\d+:\d+:\d+")
# The long options of sbatch 22.05 that a launcher has a use for, and the form of each value (man sbatch); None: none.
OPTIONS: dict[str, re.Pattern[str] | None] = {
    "job-name": WORD,
    "nodes": re.compile(r"\d+(-\d+)?"),
    "ntasks": COUNT,
    "ntasks-per-node": COUNT,
    "cpus-per-task": COUNT,
    "gpus-per-node": re.compile(r"([a-z0-9_]+:)?\d+"),
    "gres": WORD,
    "mem": re.compile(r"\d+[KMGT]?"),
    "partition": re.compile(r"\S+"),
    "account": WORD,
    "qos": WORD,
    "time": TIME,
    "signal": re.compile(r"((R?B?):)?([A-Z0-9]+)(@\d+)?"),
    "requeue": None,
    "open-mode": re.compile("append|truncate"),
    "output": re.compile(r"\S+"),
    "exclusive": None,
    "constraint": re.compile(r"\S+"),
    "reservation": WORD,
}


def directives(script: str) -> dict[str, str | None]:
    """What sbatch reads: lines of #SBATCH up to the first command, as name and value; AssertionError where it errs."""
    lines = script.splitlines()
    assert lines[0].startswith("#!"), "sbatch: This does not look like a batch script."
    found: dict[str, str | None] = {}
    for line in lines[1:]:
        if line.strip() and not line.startswith("#"):
            break
        if not line.startswith("#SBATCH"):
            continue
        (word,) = shlex.split(line.removeprefix("#SBATCH"), comments=True)
        name, has_value, value = word.removeprefix("--").partition("=")
        assert word.startswith("--") and name in OPTIONS, f"sbatch: unrecognized option {word!r}"
        form = OPTIONS[name]
        assert bool(has_value) == (form is not None), f"{word}: a value too many or too few"
        assert form is None or form.fullmatch(value), f"sbatch: invalid value {word!r}"
        assert name not in found, f"{name} is said twice"
        found[name] = value if has_value else None
    assert not any(line.startswith("#SBATCH") for line in lines[len(found) + 10 :]), "below the first command: unread"
    return found


def script(job: Job | None = None, *, time: str = "1:00:00", nodes: int = 2, nproc: int = 1, **asked: object) -> str:
    command = Command(
        recipe="recipe.yaml",
        nodes=nodes,
        nproc_per_node=nproc,
        overrides=tuple(asked.pop("overrides", ())),  # type: ignore[arg-type]
        max_restarts=2,
        program=(sys.executable, "-m", "trainfleet.cli.main"),
    )
    allocation = Allocation(time=time, **asked)  # type: ignore[arg-type]
    folder = str(job.folder) if job else "/shared/code"
    return sbatch_script(command, allocation, directory=folder, python=sys.executable)


ALL = {
    "name": "gpt", "partition": "gpu,long", "account": "project1", "qos": "high", "gpus_per_node": 4,
    "cpus_per_node": 32, "memory": "64G", "end_seconds": 120, "output": "logs/%x-%j.out",
    "options": ("--exclusive", "--constraint=a100&nvlink"),
}  # fmt: skip


def test_the_directives_are_those_of_sbatch() -> None:
    asked = directives(script(nodes=2, nproc=4, **ALL))
    assert asked == {
        "job-name": "gpt", "nodes": "2", "ntasks-per-node": "1", "cpus-per-task": "32", "gpus-per-node": "4",
        "mem": "64G", "partition": "gpu,long", "account": "project1", "qos": "high", "time": "1:00:00",
        "signal": "B:TERM@120", "requeue": None, "open-mode": "append", "output": "logs/%x-%j.out", "exclusive": None,
        "constraint": "a100&nvlink",
    }  # fmt: skip


def test_every_process_has_a_core_unless_more_are_asked_for() -> None:
    assert directives(script(nproc=4))["cpus-per-task"] == "4"


@pytest.mark.parametrize("asked", [{}, ALL, {"before": ("module load cuda", "source 'my env'/bin/activate")}])
def test_the_script_is_one_of_bash(asked: dict[str, object]) -> None:
    text = script(overrides=["data.source='it''s:Mine'", "model.args={a: [1, 2]}"], **asked)
    done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("30", 1800), ("30:15", 1815), ("12:00:00", 43200), ("2-00", 172800), ("1-6:30", 109800), ("1-0:0:1", 86401)],
)
def test_times_are_read_as_sbatch_reads_them(time: str, seconds: int) -> None:
    assert seconds_of(time) == seconds


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"time": "2h"}, "The time is '2h'; write minutes"),
        ({"time": "3", "end_seconds": 180}, r"The time is 3 \(180 s\), and the run would be told to end 180 s before"),
        ({"end_seconds": 5}, "a save needs 30 seconds"),
        ({"options": ("-N 4",)}, "not of the form --name=value"),
        ({"name": "my job"}, "name is 'my job'; a directive of sbatch ends at a space"),
    ],
)
def test_what_sbatch_would_misread_is_refused(asked: dict[str, str], words: str) -> None:
    with pytest.raises(LaunchError, match=words):
        script(**asked)  # type: ignore[arg-type]


FAKE_SRUN = """#!/usr/bin/env bash
# In place of SLURM's: the last words of its options begin with `bash`. Tasks of all "nodes" run here.
while [ "$1" != bash ]; do shift; done
exec 4<&0
pids=()
for ((node = 0; node < SLURM_NNODES; node++)); do
    mkfifo "$PLACE/in.$node.$$"
    exec {word}<>"$PLACE/in.$node.$$"
    words+=("$word")
    SLURM_PROCID=$node SLURM_NODEID=$node SLURM_LOCALID=0 SLURM_STEP_ID=0 SLURM_NTASKS=$SLURM_NNODES \\
        "$@" <"$PLACE/in.$node.$$" 4>&- &
    pids+=($!)
done
while read -r line; do for word in "${words[@]}"; do echo "$line" >&"$word"; done; done <&4 &
copier=$!
worst=0
for pid in "${pids[@]}"; do wait "$pid"; code=$?; ((code > worst)) && worst=$code; done
kill "$copier" 2>/dev/null
exit "$worst"
"""
FAKE_SCONTROL = """#!/usr/bin/env bash
echo "$@" >>"$PLACE/scontrol.said"
[ "$1 $2" = "show hostnames" ] && printf '127.0.0.1\\nlocalhost\\n'
exit 0
"""


@pytest.fixture
def pretended(job: Job, tmp_path: Path) -> Job:
    """The job, where `srun` and `scontrol` are scripts that start the tasks of two nodes here: no SLURM."""
    place = tmp_path / "bin"
    place.mkdir()
    for name, text in {"srun": FAKE_SRUN, "scontrol": FAKE_SCONTROL}.items():
        (place / name).write_text(text)
        (place / name).chmod(0o755)
    job.env.update(
        PATH=f"{place}:{job.env['PATH']}", PLACE=str(place), SLURM_JOB_ID=str(os.getpid()), SLURM_NNODES="2",
        SLURM_JOB_NODELIST="n[1-2]", SLURM_CPUS_PER_TASK="1", OMP_NUM_THREADS="1",
    )  # fmt: skip
    return job


@pytest.mark.cluster
@pytest.mark.matrix
def test_with_a_pretended_srun_the_script_trains_as_one_host_does(pretended: Job, plain: dict[int, float]) -> None:
    (pretended.folder / "job.sh").write_text(script(pretended))
    pretended.run(["bash", "job.sh"])
    assert pretended.losses() == plain


def await_step(job: Job, step: int, seconds: float = 60) -> None:
    ends = time.monotonic() + seconds
    while not (job.folder / "run" / "metrics.jsonl").exists() or step not in job.losses():
        said = "".join(path.read_text() for path in job.folder.glob("slurm-*.out"))
        assert time.monotonic() < ends, f"step {step} was not reached: {said}"
        time.sleep(0.05)


@pytest.mark.cluster
@pytest.mark.matrix
def test_told_that_the_time_is_nearly_over_it_saves_and_queues_again_and_then_goes_on(pretended: Job) -> None:
    slow = ["data.source=learner:Slow", "checkpoint.every=1000", "train.steps=40", "checkpoint.resume=never"]
    (pretended.folder / "job.sh").write_text(script(pretended, overrides=slow))
    batch = pretended.start(["bash", "job.sh"])
    await_step(pretended, 2)
    os.kill(batch.pid, signal.SIGTERM)  # the batch shell alone, as B:TERM says
    said, _ = batch.communicate(timeout=60)
    assert batch.returncode == 143, said
    stopped = max(pretended.losses())
    assert 2 <= stopped < 40
    assert "requeue" in (Path(pretended.env["PLACE"]) / "scontrol.said").read_text()

    fast = [*slow[1:2], f"train.steps={stopped + 1}"]
    (pretended.folder / "job.sh").write_text(script(pretended, overrides=[*fast, "checkpoint.resume=never"]))
    pretended.run(["bash", "job.sh"], env={"SLURM_RESTART_COUNT": "1"})
    assert sorted(pretended.losses()) == list(range(1, stopped + 2))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(reason)
    made = Cluster(tmp_path_factory.mktemp("slurm") / "cluster")
    yield made
    made.close()


@pytest.mark.cluster
def test_sbatch_takes_the_file(cluster: Cluster, job: Job) -> None:
    path = job.folder / "job.sh"
    path.write_text(script(job, options=("--exclusive",)))
    assert re.search(r"Job \d+ to start at .* on nodes \S+2", cluster.ask(["sbatch", "--test-only", str(path)]))
    path.write_text(path.read_text().replace("--open-mode=append", "--open-mode=sideways"))
    assert "error" in cluster.ask(["sbatch", "--test-only", str(path)])


def await_state(cluster: Cluster, job: Job, number: str, state: str, seconds: float = 90) -> None:
    """Until the job is in that state; what it said, if it comes to an end in another."""
    ends = time.monotonic() + seconds
    while f"JobState={state} " not in (shown := cluster.ask(["scontrol", "show", "job", number])):
        over = any(f"JobState={end} " in shown for end in ("COMPLETED", "FAILED", "CANCELLED"))
        said = "".join(path.read_text() for path in job.folder.glob("slurm-*.out"))
        assert not over and time.monotonic() < ends, f"{shown}\n{said}"
        time.sleep(0.2)


@pytest.mark.cluster
@pytest.mark.matrix
def test_slurm_itself_trains_on_two_nodes_saves_when_told_and_goes_on(
    cluster: Cluster, job: Job, plain: dict[int, float], tmp_path: Path
) -> None:
    job.env.update(cluster.env, OMP_NUM_THREADS="1")
    (job.folder / "job.sh").write_text(script(job))
    number = re.findall(r"\d+", job.run(["sbatch", "job.sh"]))[-1]
    await_state(cluster, job, number, "COMPLETED")
    assert job.losses() == plain

    slow = write_job(tmp_path / "slow")
    slow.env.update(cluster.env, OMP_NUM_THREADS="1")
    more = ["data.source=learner:Slow", "checkpoint.every=1000", "train.steps=200", "checkpoint.resume=never"]
    (slow.folder / "job.sh").write_text(script(slow, overrides=more))
    number = re.findall(r"\d+", slow.run(["sbatch", "job.sh"]))[-1]
    await_step(slow, 2)
    cluster.ask(["scancel", "--batch", "--signal=TERM", number])
    cluster.await_words(["scontrol", "show", "job", number], "Restarts=1")
    time.sleep(8)  # for the nodes to be done with the first start; SLURM itself would wait two minutes
    cluster.ask(["scontrol", "update", f"JobId={number}", "StartTime=now"])
    await_state(cluster, slow, number, "RUNNING")
    await_step(slow, max(slow.losses()) + 2, 120)
    cluster.ask(["scancel", "--batch", "--signal=INT", number])
    await_state(cluster, slow, number, "FAILED")  # ended for good, with a save
    assert sorted(slow.losses()) == list(range(1, max(slow.losses()) + 1))
    assert "queued again" in (slow.folder / f"slurm-{number}.out").read_text()
