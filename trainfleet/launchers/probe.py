"""What a host says of itself before a run: `python -m trainfleet.launchers.probe FIRST PORT RECIPE [--listens]`."""

from __future__ import annotations

import json
import platform
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from trainfleet.deps import installed


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """One host, as it was a moment ago."""

    hostname: str
    time: float
    """Seconds since the epoch, by its clock."""
    versions: dict[str, str]
    knows_first: bool
    """Whether it can resolve the name of the first host."""
    recipe: bool
    """Whether the recipe is there."""
    port_is_free: bool
    """Whether it could listen there; True where it is not asked to."""


def probe(first: str, port: int, recipe: str, *, listens: bool) -> Probe:
    return Probe(
        hostname=socket.gethostname(),
        time=time.time(),
        versions={
            "trainfleet": installed("trainfleet") or "missing",
            "torch": (installed("torch") or "missing").split("+")[0],
            "python": ".".join(platform.python_version_tuple()[:2]),
        },
        knows_first=_resolves(first),
        recipe=Path(recipe).is_file(),
        port_is_free=not listens or _is_free(port),
    )


def _resolves(name: str) -> bool:
    try:
        return bool(socket.getaddrinfo(name, None))
    except OSError:
        return False


def _is_free(port: int) -> bool:
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("", port))
        except OSError:
            return False
        return True


def main(arguments: Sequence[str]) -> int:
    first, port, recipe = arguments[:3]
    found = probe(first, int(port), recipe, listens="--listens" in arguments)
    sys.stdout.write(json.dumps(asdict(found)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
