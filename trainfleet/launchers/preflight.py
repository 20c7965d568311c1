"""What the probes of all hosts say together: whether a run can start, in sentences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from trainfleet.comm.roll_call import CLOCKS_APART_SECONDS
from trainfleet.errors import LaunchError, PeerError
from trainfleet.launchers.probe import Probe


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """The probe of a host, and when, by our clock, it was asked and had answered."""

    host: str
    probe: Probe
    asked: float
    answered: float


def check_answers(answers: Sequence[Answer], *, first: str, port: int, recipe: str, directory: str) -> list[str]:
    """Raise what would keep the run from starting; remarks on the rest."""
    head = answers[0]
    for answer in answers:
        found, host = answer.probe, answer.host
        if not found.recipe:
            raise LaunchError(
                f"{host} has no file {recipe} in {directory}.",
                hint="Every host needs the same files: on a shared disk, or copied there. --directory says where.",
            )
        if not found.knows_first:
            raise LaunchError(
                f"{host} does not know the name {first}, where the hosts are to meet.",
                hint="Call the first host by an address that all know, or say it by --rendezvous ADDRESS:PORT.",
            )
        if not found.port_is_free:
            raise LaunchError(
                f"Port {port} of {host} is in use, so the hosts cannot meet there.",
                hint=f"Choose another by --rendezvous {first}:PORT.",
            )
        for name, version in found.versions.items():
            if version != head.probe.versions.get(name):
                raise PeerError(
                    f"{host} has {name} {version}, but {head.host} has {name} {head.probe.versions.get(name)}. "
                    "Use the same everywhere."
                )
    return list(_clocks(answers))


def _clocks(answers: Sequence[Answer]) -> Iterator[str]:
    """A clock that is wrong by more than the answer can have taken."""
    head = answers[0]
    for answer in answers[1:]:
        # By how much each is ahead of our clock lies between what it is if the answer came at once, and if it was old.
        least = (answer.probe.time - answer.answered) - (head.probe.time - head.asked)
        most = (answer.probe.time - answer.asked) - (head.probe.time - head.answered)
        apart = least if least > 0 else -most if most < 0 else 0.0
        if apart > CLOCKS_APART_SECONDS:
            yield (
                f"The clock of {answer.host} is {apart:.0f} s {'ahead of' if least > 0 else 'behind'} that of "
                f"{head.host}. The report of a failure names what came first by these clocks: let both follow a time "
                "server (chrony, ntpd)."
            )
