"""Two network namespaces that act as two hosts, joined by a cable of a given rate."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import Final

ADDRESSES: Final = ("10.213.9.1", "10.213.9.2")


class Hosts:
    """Neither sees the other's loopback. Raises OSError, in words, where there can be none."""

    def __init__(self, rate: str) -> None:
        if any(shutil.which(program) is None for program in ("ip", "tc")):
            raise OSError("needs the programs `ip` and `tc` (iproute2)")
        if not hasattr(os, "geteuid") or os.geteuid() != 0:
            raise OSError("network namespaces need root")
        mark = f"{os.getpid() % 10**6}{rate[:4]}"
        self._names = tuple(f"bench{mark}{side}" for side in "ab")
        cables = tuple(f"b{mark}{side}" for side in "ab")
        try:
            for name in self._names:
                _run("ip", "netns", "add", name)
            _run("ip", "link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
            for name, cable, address in zip(self._names, cables, ADDRESSES, strict=True):
                _run("ip", "link", "set", cable, "netns", name)
                _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", cable)
                _run("ip", "-n", name, "link", "set", cable, "up")
                _run("ip", "-n", name, "link", "set", "lo", "up")
                shape = ["tbf", "rate", rate, "burst", "256kb", "latency", "50ms"]
                _run("tc", "-n", name, "qdisc", "replace", "dev", cable, "root", *shape)
        except BaseException:
            self.close()
            raise

    def prefix(self, host: int) -> list[str]:
        """What begins a command that is to run on that host, 0 or 1."""
        return ["ip", "netns", "exec", self._names[host]]

    def close(self) -> None:
        for name in self._names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
