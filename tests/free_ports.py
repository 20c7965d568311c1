"""Ports for what has to be told one in advance."""

from __future__ import annotations

import random
import socket

_ABOVE, _BELOW = 20_000, 32_768
"""Not those that the kernel gives to whoever dials: one of them may be gone before it is listened at."""


def free_ports(count: int) -> list[int]:
    """Different ports that nobody listens at now."""
    chosen: list[int] = []
    for port in random.SystemRandom().sample(range(_ABOVE, _BELOW), _BELOW - _ABOVE):
        if len(chosen) == count:
            break
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        chosen.append(port)
    assert len(chosen) == count
    return chosen


def free_port() -> int:
    return free_ports(1)[0]
