"""How the ranks of a run find each other, and make sure that they are alike, before they compute.

Rank 0 listens at the master's address (or torchrun's agent does it for everyone); every rank says
which versions it runs; rank 0 compares and tells all of them the same verdict (roll_call.py). A wait that ends
without all ranks names those that did not come.
"""

from __future__ import annotations

import logging
import os
import platform
import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import timedelta
from importlib import metadata
from typing import TYPE_CHECKING, Any

from trainfleet.comm import pmi
from trainfleet.comm.environment import RankEnvironment, is_loopback
from trainfleet.comm.roll_call import RollCall
from trainfleet.errors import LaunchError, PeerError

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

logger = logging.getLogger(__name__)

_NAME_SECONDS = 60.0

_meetings = 0  # in this process; every rank counts alike, so that each meeting has its own keys in a lasting store
_place: str | None = None  # where the ranks of this process's launcher have agreed to meet
_listening: dict[tuple[str, int], Store] = {}  # a store must outlive the slowest rank's use of it: until the exit


def versions() -> dict[str, str]:
    """What has to be alike on all ranks of a run."""
    import torch

    return {
        "trainfleet": metadata.version("trainfleet"),
        "torch": torch.__version__.split("+")[0],
        "python": ".".join(platform.python_version_tuple()[:2]),
    }


def meet(
    environment: RankEnvironment, *, timeout: timedelta, facts: Mapping[str, str] | None = None, noun: str = "rank"
) -> Store:
    """A store that all ranks share, once all have come and their `facts` (the versions they run) are alike.

    `noun` is what a rank of `environment` is called in sentences: launchers meet as hosts.
    """
    from torch.distributed import HashStore, PrefixStore  # type: ignore[attr-defined]

    global _meetings
    if environment.world_size == 1:
        return HashStore()  # type: ignore[no-any-return]
    _meetings += 1
    environment = _settled(environment, timeout, noun)
    store = PrefixStore(f"trainfleet/{environment.restart}/{_meetings}", _store_at_master(environment, timeout, noun))
    store.set_timeout(timeout)
    RollCall(store=store, environment=environment, facts=facts or versions(), timeout=timeout, noun=noun).answer()
    if not is_loopback(environment.master_addr):
        _name_interface(environment.master_addr)
    return store  # type: ignore[no-any-return]


def _settled(environment: RankEnvironment, timeout: timedelta, noun: str) -> RankEnvironment:
    """`environment` with the port that rank 0 chose, where the launcher has a space in which it can say so."""
    global _place
    if environment.master_port != 0:
        return environment
    if _place is None:
        word = None
        if environment.rank == 0:
            listening: Any = _store_at_master(environment, timeout, noun)
            _listening[environment.master_addr, listening.port] = listening
            word = f"{environment.master_addr}:{listening.port}"
        _place = pmi.tell_all(word, timeout)
    address, _, port = _place.rpartition(":")
    return replace(environment, master_addr=address, master_port=int(port))


def _store_at_master(environment: RankEnvironment, timeout: timedelta, noun: str) -> Store:
    from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

    address, port = environment.master_addr, environment.master_port
    if (address, port) in _listening:
        return _listening[address, port]
    listens = environment.rank == 0 and not environment.agent_store
    if listens:
        _await_own_name(address, timeout, noun)
    else:
        _await_listener(address, port, timeout, f"{noun.capitalize()} {environment.rank}")

    def connect() -> Store:
        # multi_tenant: the launcher's agent meets the other agents at the same port of the same process.
        return TCPStore(  # type: ignore[no-any-return]
            address, port, None, is_master=listens, timeout=timeout, wait_for_workers=False, multi_tenant=listens
        )

    try:
        store = _within(timeout, connect)
    except (DistError, RuntimeError, ValueError, TimeoutError) as exc:
        if listens and ("EADDRINUSE" in str(exc) or "address already in use" in str(exc)):
            raise LaunchError(
                f"Port {port} of this host is in use, so {noun} 0 cannot listen there.",
                hint="Another run may still be going on. Choose a free port, the same everywhere.",
            ) from exc
        raise PeerError(
            f"{noun.capitalize()} {environment.rank} found something at {address}:{port} that is not {noun} 0: {exc}",
            hint="Another program may have the port. Choose a free one, the same everywhere.",
        ) from exc
    if port:
        _listening[address, port] = store
    return store


def _within(timeout: timedelta, connect: Callable[[], Store]) -> Store:
    """What `connect` returns; TimeoutError at the deadline.

    A thread of its own, because TCPStore reads the other side's greeting without a deadline: a listener that
    says nothing would hold the process for ever (torch 2.13; remove when its constructor keeps its timeout).
    """
    results: queue.SimpleQueue[Store | BaseException] = queue.SimpleQueue()

    def run() -> None:
        try:
            results.put(connect())
        except BaseException as exc:
            results.put(exc)

    threading.Thread(target=run, daemon=True, name="connect").start()
    try:
        result = results.get(timeout=timeout.total_seconds())
    except queue.Empty:
        raise TimeoutError(f"it said nothing within {timeout.total_seconds():g} s.") from None
    if isinstance(result, BaseException):
        raise result
    return result


def _await_own_name(address: str, timeout: timedelta, noun: str) -> None:
    """Return when this host knows the name under which the others are to find it; a cluster may publish it late."""
    ends = time.monotonic() + min(timeout.total_seconds(), _NAME_SECONDS)
    while True:
        try:
            socket.getaddrinfo(address, None)
            return
        except OSError as exc:
            if time.monotonic() < ends:
                time.sleep(0.25)
                continue
            raise LaunchError(
                f"{noun.capitalize()} 0 is to listen at {address}, but this host does not know that name.",
                hint="Give an address of this host that the others can reach, or mend its entry in the name service.",
            ) from exc


def _await_listener(address: str, port: int, timeout: timedelta, who: str) -> None:
    """Return when something listens there; PeerError says what stood in the way at the end of `timeout`."""
    ends, pause = time.monotonic() + timeout.total_seconds(), 0.05
    while True:
        remaining = ends - time.monotonic()
        try:
            socket.create_connection((address, port), timeout=max(0.1, min(5.0, remaining))).close()
            return
        except OSError as exc:
            if remaining > 0:
                time.sleep(min(pause, remaining))
                pause = min(1.0, pause * 2)
                continue
            raise PeerError(
                f"{who} could not reach {address}:{port} within {timeout.total_seconds():g} s: {_obstacle(exc)}",
                hint="The address and port must be those of rank 0, which has to be running.",
            ) from exc


def _obstacle(exc: OSError) -> str:
    if isinstance(exc, socket.gaierror):
        return "this host does not know that name."
    if isinstance(exc, ConnectionRefusedError):
        return "the port is closed; nothing listens there, or a firewall refuses."
    if isinstance(exc, TimeoutError):
        return "no answer; the host is down, or a firewall swallows the packets."
    return f"{exc.strerror or exc}."


def leave(address: str, port: int) -> None:
    """Close this process's end of the store there: for a launcher, which lives on after its run."""
    _listening.pop((address, port), None)


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
