"""world: all ranks that mpiexec started, for the length of a `with`; an error on one of them ends all of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from trainfleet.comm.group import DEADLINE
from trainfleet.comm.mpi_group import MpiGroup
from trainfleet.errors import TrainfleetError
from trainfleet.mpi.watchdog import Watchdog


@contextmanager
def world(*, timeout: timedelta = DEADLINE) -> Iterator[MpiGroup]:
    """The group of all ranks; one rank where nobody used mpiexec.

    `timeout` ends each wait, with a PeerError that names the rank that did not come. An error that leaves the `with`
    on any rank ends the run on all of them, with the exit code of that error; a watchdog says which rank was first.
    """
    group = MpiGroup.world(timeout=timeout)
    if group.size == 1:
        yield group
        return
    watchdog = Watchdog(group)
    try:
        yield group
    except BaseException as error:
        if isinstance(error, SystemExit) and not error.code:
            watchdog.end_well()
            raise
        watchdog.tell(error)
        sys.excepthook(type(error), error, error.__traceback__)
        sys.stderr.flush()
        group.abort(_exit_code(error))
        raise
    watchdog.end_well()


def _exit_code(error: BaseException) -> int:
    if isinstance(error, TrainfleetError):
        return error.exit_code
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    return 130 if isinstance(error, KeyboardInterrupt) else 1
