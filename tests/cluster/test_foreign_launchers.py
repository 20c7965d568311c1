"""Under launchers that are not ours each process is one rank, and the losses are those of `trainfleet train --nproc`.

mpiexec is MPICH's own. SLURM is pretended: the variables of srun, for two processes that the test starts. (Where
SLURM is installed, tests/launchers/test_slurm.py has the real one.)
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from small_job import Job, plain_losses, write_job

MPIEXEC = Path(sys.executable).parent / "mpiexec"
TRAIN = ["trainfleet", "train", "recipe.yaml"]
pytestmark = pytest.mark.cluster
needs_mpiexec = pytest.mark.skipif(not MPIEXEC.exists(), reason="no mpiexec beside this Python: pip install mpich")


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return write_job(tmp_path / "job")


@needs_mpiexec
def test_mpiexec_trains_with_the_same_losses_to_the_bit(job: Job) -> None:
    job.run([str(MPIEXEC), "-n", "2", *TRAIN])
    assert job.losses() == plain_losses()
    cores = len(os.sched_getaffinity(0))
    assert job.threads() == [max(1, cores // 2)] * 2  # each its share: nobody has set OMP_NUM_THREADS


@needs_mpiexec
@pytest.mark.matrix
def test_under_mpiexec_a_rank_that_fails_is_told_and_ends_the_job(job: Job) -> None:
    process = job.start([str(MPIEXEC), "-n", "2", *TRAIN, "data.source=learner:Breaks", "train.steps=50"])
    said, _ = process.communicate(timeout=90)
    assert process.returncode not in (0, None)
    assert "sample 13 is rotten" in said


@needs_mpiexec
@pytest.mark.matrix
def test_mpiexec_goes_on_where_it_stopped(job: Job) -> None:
    job.run([str(MPIEXEC), "-n", "2", *TRAIN, "train.steps=3", "schedule.name=constant"])
    job.run([str(MPIEXEC), "-n", "2", *TRAIN, "train.steps=5", "schedule.name=constant"])
    assert sorted(job.losses()) == [1, 2, 3, 4, 5]


@pytest.mark.matrix
def test_processes_with_the_variables_of_srun_train_with_the_same_losses_to_the_bit(job: Job) -> None:
    step = {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_NNODES": "1"}
    step |= {"SLURM_CPUS_PER_TASK": "1", "SLURM_JOB_NODELIST": "localhost"}
    processes = [job.start(TRAIN, env={**step, "SLURM_PROCID": str(n), "SLURM_LOCALID": str(n)}) for n in range(2)]
    try:
        said = [process.communicate(timeout=90)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said
    assert job.losses() == plain_losses()


@pytest.mark.matrix
def test_two_processes_with_one_rank_are_told_so(job: Job) -> None:
    step = {"RANK": "1", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "28431"}
    processes = [job.start(TRAIN, env={**step, "RANK": rank}) for rank in ("0", "1", "1")]
    said = [process.communicate(timeout=90)[0] for process in processes]
    assert [process.returncode for process in processes] == [9, 9, 9], said
    assert all("Rank 1 of 3 came twice: from" in words for words in said)
