"""`run(size, function, *args)`: the same functions on threads and on MPI, each with a group as its first argument.

Where pytest itself runs under mpiexec (`make test-mpi`), every rank runs every test: `run` calls the function on this
rank, and all ranks see all results. Tests that need another number of ranks are left out there.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

Run = Callable[..., list[Any]]


@pytest.fixture(params=["threads", "mpi"])
def run(request: pytest.FixtureRequest) -> Run:
    if "PMI_RANK" in os.environ:
        if request.param == "threads":
            pytest.skip("under mpiexec only MPI is of interest")
        return on_all_ranks
    if request.param == "mpi":
        return request.getfixturevalue("mpi_ranks")  # type: ignore[no-any-return]
    from trainfleet.comm.threads import run_ranks

    return lambda size, function, *args: run_ranks(size, lambda group: function(group, *args))


@pytest.fixture
def run_mpi(request: pytest.FixtureRequest) -> Run:
    """The same on MPI only."""
    return on_all_ranks if "PMI_RANK" in os.environ else request.getfixturevalue("mpi_ranks")  # type: ignore[no-any-return]


def on_all_ranks(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    from trainfleet.comm.mpi_group import MpiGroup, mpi

    comm = mpi().COMM_WORLD
    if comm.size != size:
        pytest.skip(f"this test is for {size} ranks, and mpiexec started {comm.size}")
    failure, result = None, None
    try:
        result = function(MpiGroup.world(), *args)
    except Exception as error:
        failure = error
    answers = comm.allgather((result, repr(failure) if failure is not None else None))
    if failure is not None:
        raise failure
    for rank, (_, text) in enumerate(answers):
        assert text is None, f"rank {rank}: {text}"
    return [answer for answer, _ in answers]
