"""Everything that is looked at on this machine, in order; torch loads in a process of its own meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from trainfleet.deps import installed
from trainfleet.doctor.accelerators import check_torch, torch_tried
from trainfleet.doctor.clock import check_clock
from trainfleet.doctor.finding import Finding
from trainfleet.doctor.machine import (
    check_limits,
    check_memory,
    check_network,
    check_processor,
    check_python,
)
from trainfleet.doctor.outlook import outlook
from trainfleet.doctor.ports import check_usual_ports
from trainfleet.doctor.storage import check_disk
from trainfleet.doctor.variables import check_variables
from trainfleet.doctor.versions import check_copies, check_versions

Check = Callable[[], Iterator[Finding]]

CHECKS: dict[str, Callable[..., Iterator[Finding]]] = {
    "python": check_python,
    "versions": check_versions,
    "copies": check_copies,
    "processor": check_processor,
    "memory": check_memory,
    "disk": check_disk,
    "limits": check_limits,
    "network": check_network,
    "ports": check_usual_ports,
    "clock": check_clock,
    "variables": check_variables,
}
_HAS_QUICK = (check_versions, check_disk)


def examine_machine(*, quick: bool = False) -> Iterator[Finding]:
    """Findings as they come, then the outlook. `quick` leaves out torch's own trial, and what takes long.

    A check that fails itself is a note, and hides none of the others.
    """
    found: list[Finding] = []
    with torch_tried(quick=quick) as results:
        checks: dict[str, Check] = {
            name: partial(check, quick=quick) if check in _HAS_QUICK else check for name, check in CHECKS.items()
        }
        if quick:
            checks["torch"] = _torch_at_a_glance
        else:
            checks["torch"] = lambda: check_torch(results())
        for name, check in checks.items():
            for finding in _guarded(name, check):
                found.append(finding)
                yield finding
    yield from outlook(found)


def _guarded(name: str, check: Check) -> Iterator[Finding]:
    try:
        yield from check()
    except Exception as error:
        fact = f"could not be checked: {type(error).__name__}: {error}"
        yield Finding(subject=name, fact=fact, verdict="note", remedy="This is a defect of doctor: please report it.")


def _torch_at_a_glance() -> Iterator[Finding]:
    if (version := installed("torch")) is None:
        yield from check_torch([])
    else:
        yield Finding(subject="torch", fact=f"{version} is installed; --quick does not load it")
