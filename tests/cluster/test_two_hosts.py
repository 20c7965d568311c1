"""Two network namespaces act as two hosts, joined by a cable: a job trains over it, and says what is in the way."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="two hosts need torch")

from killed_run import STEPS, await_step, losses, ranks_of, same, states_at, write_job
from namespaces import Hosts, two_hosts

pytestmark = pytest.mark.cluster

PORT = 29611


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with two_hosts() as made:
        yield made


RANK = """
import torch
from trainfleet.mesh import Mesh
from trainfleet.training.ranks.failure import reported_failures

with reported_failures(), Mesh.from_env(device="cpu") as mesh:
    total = torch.full((3,), float(mesh.rank + 1))
    mesh.data_axes.all_reduce_(total).wait()
    print("total", total.tolist(), "of", mesh.world_size, flush=True)
    FAIL
"""

LAUNCHER = """
import sys
from datetime import timedelta
from trainfleet.comm import rendezvous
from trainfleet.errors import TrainfleetError
from trainfleet.training.ranks.launch import run_elastic

if "older" in sys.argv:
    rendezvous.versions.__code__ = (lambda: {"trainfleet": "0.0.1", "torch": "1.0", "python": "3.10"}).__code__
try:
    code = run_elastic(
        [sys.executable, sys.argv[1]], nproc=1, nnodes=2, rendezvous=sys.argv[2], node_rank=int(sys.argv[3]),
        timeout=timedelta(seconds=float(sys.argv[4])),
    )
except TrainfleetError as exc:
    sys.exit(f"{type(exc).__name__}: {exc}")
sys.exit(code)
"""


def launcher(
    tmp_path: Path, node: int, *, port: int = PORT, timeout: float = 60, fail: str = "", more: str = ""
) -> list[str]:
    rank = tmp_path / f"rank{node}.py"
    rank.write_text(RANK.replace("FAIL", fail or "pass"))
    endpoint = f"{Hosts.addresses[0]}:{port}"
    return [sys.executable, "-c", LAUNCHER, str(rank), endpoint, str(node), str(timeout), more]


def both(hosts: Hosts, commands: list[list[str]]) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of one command on each host."""
    processes = [hosts.start(host, command) for host, command in enumerate(commands)]
    try:
        ended = [process.communicate(timeout=90) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, out, err) for p, (out, err) in zip(processes, ended, strict=True)]


@pytest.mark.matrix
def test_two_hosts_add_up(hosts, tmp_path):
    for code, out, err in both(hosts, [launcher(tmp_path, node) for node in range(2)]):
        assert code == 0, err
        assert "total [3.0, 3.0, 3.0] of 2" in out


def test_both_hosts_name_the_rank_that_failed_first(hosts, tmp_path):
    fail = "if mesh.rank == 1: raise ValueError('on purpose')\n    mesh.data_axes.barrier()"
    for code, _, err in both(hosts, [launcher(tmp_path, node, fail=fail) for node in range(2)]):
        assert code == 1
        assert "RankFailed: Rank 1 of 2" in err
        assert "ValueError: on purpose" in err


def test_a_closed_port_on_the_other_host_is_explained(hosts, tmp_path):
    process = hosts.start(1, launcher(tmp_path, 1, port=PORT + 1, timeout=2))
    began = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - began < 20
    assert f"PeerError: Host 1 could not reach {Hosts.addresses[0]}:{PORT + 1} within 2 s: the port is closed" in err


def test_unlike_versions_are_explained_on_both_hosts(hosts, tmp_path):
    commands = [launcher(tmp_path, 0, port=PORT + 2), launcher(tmp_path, 1, port=PORT + 2, more="older")]
    for code, out, err in both(hosts, commands):
        assert code == 1
        assert "total" not in out  # no rank has started
        assert "PeerError: Host 1 (" in err
        assert "has trainfleet 0.0.1, but host 0" in err
        assert "Use the same everywhere." in err


RECIPE = Path(__file__).parents[2] / "recipes" / "gpt_stdlib.yaml"


def test_a_recipe_trains_on_two_hosts(hosts, tmp_path):
    def command(node: int) -> list[str]:
        verb = [str(Path(sys.executable).with_name("trainfleet")), "train", str(RECIPE), "--nproc", "1"]
        where = ["--nnodes", "2", "--node-rank", str(node), "--rendezvous", f"{Hosts.addresses[0]}:{PORT + 3}"]
        short = ["train.steps=2", "train.evaluate_every=null", "train.evaluate_batches=1", "train.finish=null"]
        return [*verb, *where, *short, "plan.zero=3", "monitor.log_interval=1", f"folder={tmp_path / 'run'}"]

    (code, out, err), (other_code, other_out, other_err) = both(hosts, [command(0), command(1)])
    assert (code, other_code) == (0, 0), err + other_err
    assert "zero=3 dp_replicate=1 dp_shard=2" in out
    assert "finished" in out
    assert "step" not in other_out, "only rank 0 prints"
    assert (tmp_path / "run" / "checkpoints" / "step-00000002" / "manifest.json").exists()


@pytest.mark.matrix
def test_a_run_goes_on_after_the_ranks_of_one_host_were_killed(hosts, tmp_path):
    """Twice: on the host where the ranks meet, and on the other."""
    verb = [sys.executable, "-m", "trainfleet.cli.main", "train", "recipe.yaml"]
    reference, job = tmp_path / "reference", tmp_path / "job"
    for folder in (reference, job):
        write_job(folder)
    subprocess.run([*verb, "--nproc", "2"], cwd=reference, check=True, capture_output=True, timeout=120)

    def command(node: int) -> list[str]:
        where = ["--nnodes", "2", "--node-rank", str(node), "--rendezvous", f"{Hosts.addresses[0]}:{PORT + 4}"]
        return ["env", "-C", str(job), *verb, "--nproc", "1", *where, "--max-restarts", "2"]

    processes = [hosts.start(host, command(host)) for host in range(2)]
    try:
        for host, step in ((1, 10), (0, 40)):
            await_step(job, step)
            for rank in ranks_of(processes[host].pid):
                rank.kill()
        ended = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], ended
    assert losses(job) == losses(reference)
    assert same(states_at(job, STEPS), states_at(reference, STEPS))
