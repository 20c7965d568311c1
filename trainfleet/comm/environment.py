"""Who this process is among the ranks of a run, as told by torchrun, SLURM, mpirun or by hand."""

from __future__ import annotations

import os
import re
import socket
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from trainfleet.comm.pmi import has_space
from trainfleet.container import usable_cores
from trainfleet.errors import LaunchError

DEFAULT_PORT = 29500  # torch's own choice, so that hosts of unlike launchers meet
RUN_ID = "trainfleet"
"""How the run id of an agent begins that we started."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankEnvironment:
    """A rank, how many there are, and where they meet."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Rank among those of this host: the number of its GPU."""
    local_world_size: int = 1
    """Ranks on this host."""
    master_addr: str = "127.0.0.1"
    master_port: int = DEFAULT_PORT
    """0: rank 0 takes a free one, and tells the others by its launcher's key-value space (pmi.py)."""
    launcher: Literal["trainfleet", "torchrun", "hand", "mpirun", "slurm", "none"] = "none"
    restart: int = 0
    """How often torchrun has started the ranks anew."""
    agent_store: bool = False
    """torchrun's agent already listens at the master's port; otherwise rank 0 has to."""
    error_file: str | None = None
    """The agent's file for an error of this rank, in a folder of its own; None without an agent."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise LaunchError(
                f"The rank is {self.rank} ({self.launcher}), but of {self.world_size} ranks the last is "
                f"{self.world_size - 1}. Look at RANK and WORLD_SIZE, or what your launcher sets in their place."
            )

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> RankEnvironment:
        """The first that is set: RANK (torchrun or by hand), mpirun's, SLURM's; a single process if none is."""
        variables = os.environ if env is None else env
        if "RANK" in variables or "WORLD_SIZE" in variables:
            return _from_rank(variables)
        # mpirun inside of an allocation also sees SLURM's variables, those of the step that carries it.
        if "OMPI_COMM_WORLD_RANK" in variables:
            return _from_mpi(variables, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")
        if "PMI_RANK" in variables:
            return _from_mpi(variables, "PMI_RANK", "PMI_SIZE")
        # An sbatch script is one process, though it sees SLURM_PROCID and SLURM_NTASKS; only srun makes a step.
        if "SLURM_PROCID" in variables and ("SLURM_STEP_ID" in variables or "SLURM_STEP_NUM_TASKS" in variables):
            return _from_slurm(variables)
        return cls()


def _from_rank(env: Mapping[str, str]) -> RankEnvironment:
    rank, world_size = _number(env, "RANK"), _number(env, "WORLD_SIZE")
    run_id = env.get("TORCHELASTIC_RUN_ID")
    launcher: Literal["trainfleet", "torchrun", "hand"] = "hand" if run_id is None else "torchrun"
    if run_id is not None and run_id.startswith(RUN_ID):
        launcher = "trainfleet"
    if world_size > 1 and "MASTER_ADDR" not in env:
        raise LaunchError(
            f"RANK is {rank} and WORLD_SIZE {world_size}, but MASTER_ADDR is not set. Set it to the host of rank 0 "
            "(127.0.0.1 if all are on one host) and MASTER_PORT to a free port of it, or start with `trainfleet train`."
        )
    address = env.get("MASTER_ADDR", "127.0.0.1")
    one_host = is_loopback(address)
    local_world_size = _number(env, "LOCAL_WORLD_SIZE", world_size if one_host else 1)
    return RankEnvironment(
        rank=rank,
        world_size=world_size,
        local_rank=_number(env, "LOCAL_RANK", rank % local_world_size),
        local_world_size=local_world_size,
        master_addr=address,
        master_port=_number(env, "MASTER_PORT", DEFAULT_PORT),
        launcher=launcher,
        restart=_number(env, "TORCHELASTIC_RESTART_COUNT", 0),
        agent_store=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        error_file=env.get("TORCHELASTIC_ERROR_FILE") or None,
    )


def _from_mpi(env: Mapping[str, str], rank_name: str, size_name: str) -> RankEnvironment:
    rank, world_size = _number(env, rank_name), _number(env, size_name)
    local = "OMPI_COMM_WORLD_LOCAL_" if rank_name.startswith("OMPI") else None
    if local is not None:
        local_rank, local_size = _number(env, f"{local}RANK", 0), _number(env, f"{local}SIZE", world_size)
    else:
        local_rank = _number(env, "MPI_LOCALRANKID", _number(env, "SLURM_LOCALID", rank))
        local_size = _number(env, "MPI_LOCALNRANKS", world_size)
    # Hydra gives the ranks a place to agree; then no variable has to say where they meet.
    agreed = local is None and has_space(env) and not {"MASTER_ADDR", "MASTER_PORT"} & set(env)
    if local_size < world_size and "MASTER_ADDR" not in env and not agreed:
        raise LaunchError(
            f"mpirun started {world_size} ranks on several hosts, and does not say where rank 0 is. "
            "Pass it on: `mpirun -x MASTER_ADDR=<host of rank 0>` (Open MPI) or `-genv MASTER_ADDR <host>` (MPICH)."
        )
    return RankEnvironment(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_size,
        master_addr=env.get("MASTER_ADDR") or _own_name(env, several_hosts=local_size < world_size),
        master_port=0 if agreed else _number(env, "MASTER_PORT", _port_of_job(env.get("PMIX_NAMESPACE"))),
        launcher="mpirun",
    )


def _from_slurm(env: Mapping[str, str]) -> RankEnvironment:
    world_size = _number(env, "SLURM_STEP_NUM_TASKS", _number(env, "SLURM_NTASKS", 1))
    num_nodes = _number(env, "SLURM_STEP_NUM_NODES", _number(env, "SLURM_NNODES", 1))
    hosts = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST") or ""
    if num_nodes > 1 and not hosts and "MASTER_ADDR" not in env:
        raise LaunchError(f"SLURM started {num_nodes} nodes without SLURM_JOB_NODELIST; set MASTER_ADDR to the first.")
    tasks = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or ""
    job = f"{env.get('SLURM_JOB_ID', '')}.{env.get('SLURM_STEP_ID', '')}"
    return RankEnvironment(
        rank=_number(env, "SLURM_PROCID"),
        world_size=world_size,
        local_rank=_number(env, "SLURM_LOCALID", 0),
        local_world_size=_tasks_of_node(tasks, _number(env, "SLURM_NODEID", 0), -(-world_size // num_nodes)),
        master_addr=env.get("MASTER_ADDR", first_host(hosts) if num_nodes > 1 else "127.0.0.1"),
        master_port=_number(env, "MASTER_PORT", _port_of_job(job)),
        launcher="slurm",
    )


def share_cores(environment: RankEnvironment) -> None:
    """Give this rank its share of the cores, where its launcher leaves each rank all of them; before torch is imported.

    Our own agent and torchrun set OMP_NUM_THREADS. mpiexec and srun do not, and ranks that all use every core are
    slow, and round differently.
    """
    if environment.launcher in ("mpirun", "slurm"):
        threads = _positive(os.environ.get("SLURM_CPUS_PER_TASK")) or threads_per_rank(environment.local_world_size)
        if threads is not None:
            os.environ.setdefault("OMP_NUM_THREADS", str(threads))


def threads_per_rank(num_local_ranks: int, env: Mapping[str, str] | None = None) -> int | None:
    """A fair share of this host's cores for each of its ranks; None where OMP_NUM_THREADS has been set."""
    if "OMP_NUM_THREADS" in (os.environ if env is None else env):
        return None
    return max(1, usable_cores() // num_local_ranks)


def first_host(nodelist: str) -> str:
    """The first name of a SLURM node list: `gpu01` of `gpu[01-03,07],cpu5`."""
    first = re.split(r",(?![^\[]*\])", nodelist)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def is_loopback(address: str) -> bool:
    """Whether an address means this host to everyone who uses it."""
    return address in ("localhost", "::1") or address.startswith("127.")


def _own_name(env: Mapping[str, str], *, several_hosts: bool) -> str:
    """How the other ranks call this host: as the launcher does, or loopback where all are on it."""
    return (env.get("PMI_HOSTNAME") or socket.gethostname()) if several_hosts else "127.0.0.1"


def _positive(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() and int(text) > 0 else None


def _tasks_of_node(tasks: str, node: int, otherwise: int) -> int:
    """Tasks on a node by SLURM's `2(x3),1`: two on each of the first three nodes, one on the fourth."""
    counts: list[int] = []
    for count, repeat in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks):
        counts += [int(count)] * int(repeat or 1)
    return counts[node] if node < len(counts) else otherwise


def _port_of_job(job: str | None) -> int:
    """A port that all ranks of a job choose and two jobs of a host hardly ever share, below the ephemeral ones."""
    return 20000 + zlib.crc32(job.encode()) % 10000 if job else DEFAULT_PORT


def _number(env: Mapping[str, str], name: str, otherwise: int | None = None) -> int:
    text = env.get(name)
    if text is None:
        if otherwise is None:
            raise LaunchError(f"{name} is not set, but its companions are. Set RANK and WORLD_SIZE both, or neither.")
        return otherwise
    try:
        return int(text)
    except ValueError:
        raise LaunchError(f"{name} is {text!r} in the environment; it has to be a whole number.") from None
