"""The hosts of a run, from the command line or from a file, as `mpiexec` has them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainfleet.comm.environment import is_loopback
from trainfleet.errors import LaunchError

_HOST = re.compile(r"([A-Za-z0-9_.-]+@)?(?!-)[A-Za-z0-9_.:-]+")  # never an option of ssh


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """A machine that ssh can reach."""

    target: str
    """As ssh is told: host or user@host."""
    slots: int | None = None
    """Processes that it is to have, where somebody said so."""

    @property
    def name(self) -> str:
        """How other hosts call it."""
        return self.target.rpartition("@")[2]


def read_hosts(text: str) -> list[Host]:
    """From `a,b` or `a:4,b:4`."""
    return checked_hosts([_host(word, "--hosts") for word in text.split(",") if word.strip()])


def read_hosts_file(path: Path) -> list[Host]:
    """From lines of `name`, `name slots=4` (Open MPI) or `name:4` (MPICH); # begins a comment."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as exc:
        raise LaunchError(f"The list of hosts {path} cannot be read: {exc.strerror}.") from exc
    hosts = []
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        host = _host(words[0], f"{path}, line {number}")
        for word in words[1:]:
            name, _, value = word.partition("=")
            if name == "slots" and value.isdigit():
                host = Host(target=host.target, slots=int(value))
        hosts.append(host)
    return checked_hosts(hosts)


def nproc_of(hosts: Sequence[Host], nproc: int | None) -> int:
    """Processes on every host: as asked for, else as many as the list says."""
    if nproc is not None:
        return nproc
    slots = {host.slots or 1 for host in hosts}
    if len(slots) > 1:
        unlike = ", ".join(f"{host.name} {host.slots or 1}" for host in hosts)
        raise LaunchError(
            f"The hosts have unlike numbers of slots: {unlike}.",
            hint="Every host runs as many processes: say how many by --nproc-per-node.",
        )
    return slots.pop()


def checked_hosts(hosts: list[Host]) -> list[Host]:
    """The hosts; LaunchError where there is none, or one is listed twice."""
    if not hosts:
        raise LaunchError("The list of hosts is empty. Name at least one.")
    names = [host.name for host in hosts]
    for name in names:
        if names.count(name) > 1:
            raise LaunchError(
                f"The host {name} is listed {names.count(name)} times. List it once, and raise --nproc-per-node."
            )
    return hosts


def check_meeting(first: str, hosts: Sequence[Host]) -> None:
    """LaunchError where the hosts are to meet at an address that each would take for its own."""
    if is_loopback(first) and not all(is_loopback(host.name) for host in hosts):
        raise LaunchError(
            f"The hosts are to meet at {first}, which each of them takes for itself.",
            hint="List the first host by a name that the others know, or name a place by --rendezvous HOST:PORT.",
        )


def _host(word: str, where: str) -> Host:
    target, colon, slots = word.strip().rpartition(":")
    if not colon or ":" in target:  # a name, or an address of IPv6
        target, slots = word.strip(), ""
    if not _HOST.fullmatch(target) or (slots and not slots.isdigit()):
        raise LaunchError(f"{where}: {word!r} is no host. Write name, user@name or name:slots.")
    return Host(target=target, slots=int(slots) if slots else None)
