"""Which ports of this host are free to listen at, and on which interfaces."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator, Sequence

from trainfleet.doctor.finding import Finding
from trainfleet.errors import ConfigError

SERVE = 7800
"""Of `trainfleet gpu-service`, unless told otherwise."""


def check_usual_ports() -> Iterator[Finding]:
    """Those that trainfleet uses unless told otherwise: one line where all are free, else who has which."""
    usual = usual_ports()
    taken = [found for port, use in usual.items() if (found := _examine(port, use, by_name=False)).verdict != "ok"]
    yield from taken
    if not taken:
        yield Finding(subject="ports", fact=f"{', '.join(f'{port} ({use})' for port, use in usual.items())} are free")


def usual_ports() -> dict[int, str]:
    """Default ports, and what listens there."""
    from trainfleet.comm.environment import DEFAULT_PORT as RENDEZVOUS
    from trainfleet.net.address import DEFAULT_PORT as FEED

    return {FEED: "feed", SERVE: "gpu-service", RENDEZVOUS: "rendezvous"}


def check_ports(chosen: Sequence[int]) -> Iterator[Finding]:
    """The usual ports, or those that are chosen, each with its interfaces."""
    usual = usual_ports()
    for port in chosen or usual:
        if not 1 <= port <= 65535:
            raise ConfigError(f"{port} is no port; ports go from 1 to 65535.")
        yield _examine(port, usual.get(port, ""), by_name=bool(chosen))
    yield Finding(subject="free", fact=f"{', '.join(map(str, free_ports(3)))} are free too, now")


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens at now, on any interface; another program may take them a moment later."""
    with_ports = [socket.socket() for _ in range(count)]
    try:
        for sock in with_ports:
            sock.bind(("", 0))
        return sorted(sock.getsockname()[1] for sock in with_ports)
    finally:
        for sock in with_ports:
            sock.close()


def _examine(port: int, use: str, *, by_name: bool) -> Finding:
    subject = f"port {port}"
    use = f" ({use})" if use else ""
    obstacles = {name: reason for name, host in interfaces().items() if (reason := _obstacle(host, port))}
    free = [name for name in interfaces() if name not in obstacles]
    if not obstacles:
        where = f" on {', '.join(free)}" if by_name else ""
        reach = "From the other host `trainfleet doctor THIS-HOST:PORT` tells whether a firewall lets it through."
        return Finding(subject=subject, fact=f"can be listened at{where}{use}", remedy=reach if by_name else "")
    reason = next(iter(obstacles.values()))
    held = f"; {who}" if (who := _holder(port)) else ""
    some = f" on {', '.join(obstacles)}, free on {', '.join(free)}" if free else ""
    remedy = (
        "Ports below 1024 are for root; choose a higher one."
        if reason == "not permitted"
        else f"Is it running already? Otherwise give another port, such as {free_ports(1)[0]}."
    )
    return Finding(
        subject=subject,
        fact=f"{reason}{some}{held}{use}",
        verdict="no" if by_name else "note",
        remedy=remedy,
        exit_code=ConfigError.exit_code,
    )


def interfaces() -> dict[str, str]:
    """Names of interfaces with their IPv4 address, such as `lo 127.0.0.1`."""
    import psutil

    found = {}
    for name, addresses in psutil.net_if_addrs().items():
        for each in addresses:
            if each.family == socket.AF_INET:
                found[f"{name} {each.address}"] = each.address
    return found


def _obstacle(host: str, port: int) -> str:
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, port))
        except OSError as exc:
            reasons = {errno.EADDRINUSE: "in use", errno.EACCES: "not permitted"}
            return reasons.get(exc.errno or 0, (exc.strerror or str(exc)).lower())
    return ""


def _holder(port: int) -> str:
    """Who listens there, where the system tells."""
    import psutil

    try:
        for each in psutil.net_connections(kind="tcp"):
            if each.status == psutil.CONN_LISTEN and each.laddr and each.laddr.port == port and each.pid:
                return f"{psutil.Process(each.pid).name()} (process {each.pid}) has it"
    except (psutil.Error, OSError):
        pass
    return ""
