"""How the ranks of a run find each other, and make sure that they are alike, before they compute.

Rank 0 listens at the master's address (or torchrun's agent does it for everyone); every rank says
which versions it runs; rank 0 compares and tells all of them the same verdict. A wait that ends
without all ranks names those that did not come.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import socket
from datetime import timedelta
from importlib import metadata
from typing import TYPE_CHECKING, Any

from trainfleet.comm.environment import RankEnvironment, is_loopback
from trainfleet.errors import LaunchError, PeerError

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

logger = logging.getLogger(__name__)

_meetings = 0  # in this process; every rank counts alike, so that each meeting has its own keys in a lasting store
_listening: dict[tuple[str, int], Store] = {}  # a store must outlive the slowest rank's use of it: until the exit


def versions() -> dict[str, str]:
    """What has to be alike on all ranks of a run."""
    import torch

    return {
        "trainfleet": metadata.version("trainfleet"),
        "torch": torch.__version__.split("+")[0],
        "python": ".".join(platform.python_version_tuple()[:2]),
    }


def meet(environment: RankEnvironment, *, timeout: timedelta) -> Store:
    """A store that all ranks share, once all have come and are of the same versions."""
    from torch.distributed import HashStore, PrefixStore  # type: ignore[attr-defined]

    global _meetings
    if environment.world_size == 1:
        return HashStore()  # type: ignore[no-any-return]
    _meetings += 1
    store = PrefixStore(f"trainfleet/{environment.restart}/{_meetings}", _store_at_master(environment, timeout))
    store.set_timeout(timeout)
    _compare(store, environment, versions(), timeout)
    if not is_loopback(environment.master_addr):
        _name_interface(environment.master_addr)
    return store


def _store_at_master(environment: RankEnvironment, timeout: timedelta) -> Store:
    from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

    address, port = environment.master_addr, environment.master_port
    if (address, port) in _listening:
        return _listening[address, port]
    listens = environment.rank == 0 and not environment.agent_store
    try:
        store = TCPStore(address, port, environment.world_size, listens, timeout, wait_for_workers=False)
    except (DistError, RuntimeError) as exc:
        if (listens and "EADDRINUSE" in str(exc)) or "address already in use" in str(exc):
            raise LaunchError(
                f"Port {port} of this host is in use, so rank 0 cannot listen there.",
                hint="Another run may still be going on. Set MASTER_PORT to a free port, the same on all ranks.",
            ) from exc
        raise PeerError(
            f"Rank {environment.rank} could not reach rank 0 at {address}:{port} within {timeout.total_seconds():g} s.",
            hint="Is rank 0 running, are MASTER_ADDR and MASTER_PORT right, and does a firewall let the port through?",
        ) from exc
    _listening[address, port] = store
    return store


def _compare(store: Store, environment: RankEnvironment, mine: dict[str, str], timeout: timedelta) -> None:
    """Rank 0 looks at everyone's versions; all ranks return, or all raise the same PeerError."""
    import torch.distributed as dist

    host = socket.gethostname()
    store.set(f"rank/{environment.rank}", json.dumps({"host": host, "versions": mine}))
    if environment.rank == 0:
        store.set("verdict", json.dumps(_verdict(store, environment.world_size, timeout)))
    try:
        # Rank 0's own wait has to end first, so that its verdict still finds us here.
        store.wait(["verdict"], timeout + timedelta(seconds=10))
    except (dist.DistError, RuntimeError) as exc:
        raise PeerError(
            f"Rank {environment.rank} met no rank 0 at {environment.master_addr}:{environment.master_port} "
            f"within {timeout.total_seconds():g} s, though something listens there."
        ) from exc
    complaint = json.loads(store.get("verdict"))
    if complaint:
        raise PeerError(complaint)


def _verdict(store: Store, world_size: int, timeout: timedelta) -> str:
    """What is wrong with the ranks that came, in a sentence; empty when nothing is."""
    import torch.distributed as dist

    keys = [f"rank/{rank}" for rank in range(world_size)]
    try:
        store.wait(keys, timeout)
    except (dist.DistError, RuntimeError):
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        if missing:
            return (
                f"Of {world_size} ranks, rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))} did not "
                f"come within {timeout.total_seconds():g} s. Start all with the same WORLD_SIZE, or raise the timeout."
            )
    first: dict[str, Any] = json.loads(store.get(keys[0]))
    for rank, key in enumerate(keys):
        other = json.loads(store.get(key))
        for name, version in first["versions"].items():
            if other["versions"].get(name) != version:
                return (
                    f"Rank {rank} on {other['host']} runs {name} {other['versions'].get(name)}, but rank 0 on "
                    f"{first['host']} runs {name} {version}. Install the same versions on all hosts."
                )
    return ""


def _name_interface(master: str) -> None:
    """Tell gloo the interface that leads to `master`.

    By itself gloo takes the address that the host's name resolves to, which on many hosts is a loopback
    address, and then no other host can reach it.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    interface = interface_towards(master)
    if interface is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
        logger.debug("gloo uses the interface %s, which leads to %s", interface, master)


def address_towards(host: str) -> str | None:
    """The address of this host from which packets to `host` go out; None where there is no route."""
    try:
        family, kind, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)  # a datagram socket sends nothing here
            return str(probe.getsockname()[0])
    except OSError:
        return None


def interface_towards(host: str) -> str | None:
    """The name of the interface from which packets to `host` go out, such as `eth0`."""
    import psutil

    address = address_towards(host)
    if address is None or is_loopback(address):
        # Rank 0's own host: whichever interface bears the address that the others call.
        address = host
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in addresses):
            return name
    return None
