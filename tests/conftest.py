"""Fixtures of all tests: `ranks(4, function, *args)` runs a function on four processes."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.append(str(Path(__file__).parent / "cluster"))  # the workers look there for `rank_pool` too

if TYPE_CHECKING:
    from mpi_pool import MpiPools
    from rank_pool import RankPools

with contextlib.suppress(ModuleNotFoundError):  # the tests that draw their examples need it, the others do not
    from hypothesis import HealthCheck, settings

    settings.register_profile("any_machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("any_machine")


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPools]:
    """Runs `function(*args)` on that many processes with a gloo default process group; see `RankPools`."""
    pytest.importorskip("torch", reason="several ranks need torch")
    from rank_pool import RankPools

    pools = RankPools()
    yield pools
    pools.close()


@pytest.fixture(scope="session")
def mpi_ranks() -> Iterator[MpiPools]:
    """Runs `function(group, *args)` on that many processes under mpiexec; see `MpiPools`."""
    pytest.importorskip("mpi4py", reason="MPI is not installed: pip install 'trainfleet[mpi]'")
    from mpi_pool import MPIEXEC, MpiPools

    if not MPIEXEC.exists():
        pytest.skip("there is no mpiexec beside this Python: pip install mpich")
    pools = MpiPools()
    yield pools
    pools.close()


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """The command line sets up the package's logger; a test that runs it must not change what the next one hears."""
    logger = logging.getLogger("trainfleet")
    before = logger.level, logger.propagate, list(logger.handlers)
    yield
    logger.level, logger.propagate, logger.handlers = before


NEEDS_TORCH = "parallel"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Where torch is missing, what is torch throughout is left out, and the header says so."""
    return True if collection_path.name == NEEDS_TORCH and not _has_torch() else None


def pytest_report_header() -> str | None:
    return None if _has_torch() else f"torch is not installed: tests/{NEEDS_TORCH} is left out, others skip in words"


def _has_torch() -> bool:
    return importlib.util.find_spec("torch") is not None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if {"ranks", "mpi_ranks"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("cluster")
