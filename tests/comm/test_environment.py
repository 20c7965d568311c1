"""A rank is recognised under every launcher, and half an environment is refused in words."""

from __future__ import annotations

import os

import pytest

from trainfleet.comm.environment import DEFAULT_PORT, RankEnvironment, first_host, share_cores
from trainfleet.errors import LaunchError


def recognised(**env: object) -> RankEnvironment:
    return RankEnvironment.from_env({name: str(value) for name, value in env.items()})


def test_without_a_launcher_there_is_one_rank():
    assert recognised() == RankEnvironment()
    assert RankEnvironment().world_size == 1


TORCHRUN = {
    "RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4, "MASTER_ADDR": "a", "MASTER_PORT": 4000,
    "TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": 2, "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_ERROR_FILE": "/e",
}  # fmt: skip


def test_torchrun():
    assert recognised(**TORCHRUN) == RankEnvironment(
        rank=5, world_size=8, local_rank=1, local_world_size=4, master_addr="a", master_port=4000,
        launcher="torchrun", restart=2, agent_store=True, error_file="/e",
    )  # fmt: skip


def test_our_own_agent_is_told_from_torchrun_by_its_run_id():
    assert recognised(**{**TORCHRUN, "TORCHELASTIC_RUN_ID": "trainfleet"}).launcher == "trainfleet"


def test_by_hand_on_one_host_the_local_rank_is_the_rank():
    env = recognised(RANK=2, WORLD_SIZE=4, MASTER_ADDR="127.0.0.1")
    assert (env.local_rank, env.local_world_size, env.master_port) == (2, 4, DEFAULT_PORT)
    assert env.launcher == "hand"
    assert not env.agent_store


def test_by_hand_on_many_hosts_there_is_one_rank_a_host_unless_said():
    assert recognised(RANK=3, WORLD_SIZE=4, MASTER_ADDR="node-0").local_rank == 0
    assert recognised(RANK=3, WORLD_SIZE=4, MASTER_ADDR="node-0", LOCAL_WORLD_SIZE=2).local_rank == 1


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"RANK": 1}, "WORLD_SIZE is not set"),
        ({"WORLD_SIZE": 2}, "RANK is not set"),
        ({"RANK": 1, "WORLD_SIZE": 2}, "MASTER_ADDR is not set"),
        ({"RANK": "one", "WORLD_SIZE": 2}, "RANK is 'one'"),
        ({"RANK": 2, "WORLD_SIZE": 2, "MASTER_ADDR": "a"}, "of 2 ranks the last is 1"),
        ({"OMPI_COMM_WORLD_RANK": 1, "OMPI_COMM_WORLD_SIZE": 4, "OMPI_COMM_WORLD_LOCAL_SIZE": 2}, "MASTER_ADDR"),
        ({"SLURM_PROCID": 0, "SLURM_STEP_ID": 0, "SLURM_NTASKS": 2, "SLURM_NNODES": 2}, "SLURM_JOB_NODELIST"),
    ],
)
def test_half_an_environment_is_refused(env, words):
    with pytest.raises(LaunchError, match=words):
        recognised(**env)


SLURM = {
    "SLURM_PROCID": 5, "SLURM_LOCALID": 0, "SLURM_NODEID": 3, "SLURM_STEP_NUM_TASKS": 7, "SLURM_STEP_NUM_NODES": 4,
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1,2", "SLURM_STEP_NODELIST": "gpu[03-05],cpu1", "SLURM_JOB_ID": 77,
    "SLURM_STEP_ID": 0, "SLURM_NTASKS": 9,
}  # fmt: skip


def test_srun():
    env = recognised(**SLURM)
    assert (env.rank, env.world_size, env.local_rank, env.local_world_size) == (5, 7, 0, 2)
    assert (env.master_addr, env.launcher) == ("gpu03", "slurm")
    assert env.master_port == recognised(**{**SLURM, "SLURM_PROCID": 0}).master_port  # all ranks choose the same
    assert env.master_port != recognised(**{**SLURM, "SLURM_JOB_ID": 78}).master_port  # two jobs hardly ever
    assert 20000 <= env.master_port < 30000


def test_an_sbatch_script_is_one_process():
    env = {name: value for name, value in SLURM.items() if "STEP" not in name}
    assert recognised(**env) == RankEnvironment()


def test_srun_on_one_node_meets_on_loopback():
    env = recognised(SLURM_PROCID=1, SLURM_NTASKS=2, SLURM_STEP_ID=0, SLURM_LOCALID=1, SLURM_NNODES=1)
    assert (env.rank, env.world_size, env.local_world_size, env.master_addr) == (1, 2, 2, "127.0.0.1")


def test_open_mpi_and_mpich_and_both_within_an_allocation():
    open_mpi = {"OMPI_COMM_WORLD_RANK": 3, "OMPI_COMM_WORLD_SIZE": 4, "OMPI_COMM_WORLD_LOCAL_RANK": 1}
    env = recognised(**open_mpi, OMPI_COMM_WORLD_LOCAL_SIZE=2, MASTER_ADDR="a", **SLURM)
    assert (env.rank, env.world_size, env.local_rank, env.local_world_size) == (3, 4, 1, 2)
    assert (env.master_addr, env.launcher) == ("a", "mpirun")
    env = recognised(PMI_RANK=1, PMI_SIZE=2, MPI_LOCALRANKID=1, MPI_LOCALNRANKS=2, **SLURM)
    assert (env.rank, env.world_size, env.local_rank, env.master_addr) == (1, 2, 1, "127.0.0.1")


def test_hydra_lets_rank_0_choose_the_place_on_one_host_and_on_many():
    hydra = {"PMI_RANK": 3, "PMI_SIZE": 4, "PMI_FD": 9, "PMI_HOSTNAME": "node-1", "MPI_LOCALRANKID": 1}
    env = recognised(**hydra, MPI_LOCALNRANKS=2)
    assert (env.rank, env.local_rank, env.local_world_size) == (3, 1, 2)
    assert (env.master_addr, env.master_port) == ("node-1", 0)  # 0: agreed upon when they meet
    assert recognised(**hydra, MPI_LOCALNRANKS=4).master_addr == "127.0.0.1"
    by_hand = recognised(**hydra, MPI_LOCALNRANKS=2, MASTER_ADDR="node-0")
    assert (by_hand.master_addr, by_hand.master_port) == ("node-0", DEFAULT_PORT)


@pytest.mark.parametrize(
    ("launcher", "env", "threads"),
    [
        ("mpirun", {}, "3"),
        ("slurm", {}, "3"),
        ("slurm", {"SLURM_CPUS_PER_TASK": "5"}, "5"),
        ("mpirun", {"OMP_NUM_THREADS": "7"}, "7"),
        ("trainfleet", {}, None),  # its agent has seen to that
        ("none", {}, None),
    ],
)
def test_ranks_that_no_agent_started_share_the_cores(monkeypatch, launcher, env, threads):
    for name in ("OMP_NUM_THREADS", "SLURM_CPUS_PER_TASK"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(6)), raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    share_cores(RankEnvironment(world_size=2, local_world_size=2, launcher=launcher))
    assert os.environ.get("OMP_NUM_THREADS") == threads


def test_what_is_set_by_hand_wins_over_every_launcher():
    assert recognised(RANK=0, WORLD_SIZE=1, OMPI_COMM_WORLD_RANK=3, PMI_RANK=2, **SLURM).launcher == "hand"


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("gpu01", "gpu01"),
        ("gpu01,gpu02", "gpu01"),
        ("gpu[01-03,07],cpu5", "gpu01"),
        ("gpu[7,9]", "gpu7"),
        ("rack[2-3]-node[10-12].site", "rack2-node10.site"),
        ("a-b[1-2]", "a-b1"),
    ],
)
def test_the_first_host_of_a_node_list(nodelist, host):
    assert first_host(nodelist) == host
