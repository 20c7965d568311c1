"""Two network namespaces that act as two hosts, joined by a cable of any rate."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


class Hosts:
    """Two namespaces with the addresses 10.213.7.1 and 10.213.7.2; neither sees the other's loopback."""

    addresses = ("10.213.7.1", "10.213.7.2")

    def __init__(self) -> None:
        self.names = tuple(f"fleet{os.getpid()}{side}" for side in "ab")
        self._cables = tuple(f"fl{os.getpid() % 10**8}{side}" for side in "ab")
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", self._cables[0], "type", "veth", "peer", "name", self._cables[1])
        for name, cable, address in zip(self.names, self._cables, self.addresses, strict=True):
            ip("link", "set", cable, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", cable)
            ip("-n", name, "link", "set", cable, "up")
            ip("-n", name, "link", "set", "lo", "up")

    def start(self, host: int, command: list[str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["ip", "netns", "exec", self.names[host], *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={key: value for key, value in os.environ.items() if key != "GLOO_SOCKET_IFNAME"},
        )

    def limit(self, rate: str) -> None:
        """The cable carries no more than that from now on, such as `100mbit`, both ways; skips where it cannot be."""
        if shutil.which("tc") is None:
            pytest.skip("the rate of a cable is set by the program `tc` (iproute2)")
        for name, cable in zip(self.names, self._cables, strict=True):
            shape = ["tbf", "rate", rate, "burst", "256kb", "latency", "50ms"]
            done = subprocess.run(
                ["tc", "-n", name, "qdisc", "replace", "dev", cable, "root", *shape], capture_output=True, text=True
            )
            if done.returncode:
                pytest.skip(f"this kernel has no token bucket for cables: {done.stderr.strip()}")

    def unplug(self) -> None:
        ip("-n", self.names[0], "link", "set", self._cables[0], "down")

    def plug_in(self) -> None:
        ip("-n", self.names[0], "link", "set", self._cables[0], "up")

    def close(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Skips, in words, where there can be none."""
    if shutil.which("ip") is None:
        pytest.skip("two hosts need the program `ip` (iproute2)")
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    try:
        made = Hosts()
    except subprocess.CalledProcessError as exc:
        pytest.skip(f"this kernel makes no network namespaces: {exc.stderr!r}")
    try:
        yield made
    finally:
        made.close()
