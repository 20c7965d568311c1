"""SystemSampler: looks at the machine, and knows from the look before how fast its counters go."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import psutil

from trainfleet.container import memory_left, memory_limit
from trainfleet.monitor.memory import resident_bytes
from trainfleet.monitor.system.gpu import Gpus
from trainfleet.monitor.system.stats import InterfaceStats, SystemStats, of_a_rank

SHORTEST_SECONDS = 0.1
"""Between two looks that a rate is made of: the kernel counts a core's time in steps of 0.01 s."""

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Counters:
    """What only ever grows; None where it cannot be read here."""

    at: float
    process: int
    cpu_seconds: dict[str, float] = field(default_factory=dict)
    process_seconds: float | None = None
    disk: tuple[int, int] | None = None
    network: dict[str, tuple[int, int]] = field(default_factory=dict)


class SystemSampler:
    """A look costs about 0.3 ms and a GPU's answers; what a container hides is None, and nothing raises."""

    def __init__(self, folder: str | Path = ".", *, device: str | None = None) -> None:
        """`folder` is where the run writes; `device`, such as `cuda:1`, is its GPU: None for all of the machine."""
        self._folder = Path(folder)
        self._gpus = Gpus(device) if device is None or device.startswith("cuda") else None
        self._own = psutil.Process()
        self._before = self._count()
        self._rates = SystemStats()

    def look(self) -> SystemStats:
        """As the machine is now; rates since the look before, or since this was made."""
        now = self._count()
        if now.at - self._before.at >= SHORTEST_SECONDS or now.process != self._before.process:
            self._rates = _rates(self._before, now)
            self._before = now
        memory, left = _told(psutil.virtual_memory), memory_left()
        available = memory.available if memory is not None else None
        if left is not None:
            available = left if available is None else min(left, available)
        disk = _told(lambda: os.statvfs(self._folder))
        return replace(
            self._rates,
            memory_total_bytes=memory.total if memory is not None else None,
            memory_available_bytes=available,
            memory_limit_bytes=memory_limit(),
            process_memory_bytes=_told(resident_bytes),
            disk_free_bytes=disk.f_bavail * disk.f_frsize if disk is not None else None,
            disk_total_bytes=disk.f_blocks * disk.f_frsize if disk is not None else None,
            gpus=self._gpus.look() if self._gpus is not None else (),
        )

    def numbers(self) -> dict[str, float]:
        """All that is known, flat."""
        return self.look().flat()

    def numbers_of_a_rank(self) -> dict[str, float]:
        """The same without what another rank of this host tells: for all but the first of a host."""
        return of_a_rank(self.look().flat())

    def _count(self) -> _Counters:
        if self._own.pid != os.getpid():  # forked
            self._own = psutil.Process()
        cpu, own = _told(lambda: psutil.cpu_times()._asdict()), _told(self._own.cpu_times)
        # Without nowrap psutil would keep, and lock, what it saw before: we see for ourselves that a counter fell.
        disk = _told(lambda: psutil.disk_io_counters(nowrap=False))
        network = _told(lambda: psutil.net_io_counters(pernic=True, nowrap=False)) or {}
        return _Counters(
            at=time.monotonic(),
            process=os.getpid(),
            cpu_seconds=cpu or {},
            process_seconds=None if own is None else own.user + own.system,
            disk=None if disk is None else (disk.read_bytes, disk.write_bytes),
            network={name: (each.bytes_recv, each.bytes_sent) for name, each in network.items()},
        )


def _rates(before: _Counters, now: _Counters) -> SystemStats:
    """From two looks; a counter that fell began anew in between, and has no rate."""
    seconds = max(now.at - before.at, 1e-9)
    own = _grown(before.process_seconds, now.process_seconds) if before.process == now.process else None
    read, written = (_grown(*pair) for pair in zip(before.disk or (None, None), now.disk or (None, None)))
    network = {}
    for name, counted in now.network.items():
        received, sent = (_grown(*pair) for pair in zip(before.network.get(name, (None, None)), counted))
        if received is not None and sent is not None:
            network[name] = InterfaceStats(
                received_bytes_per_second=received / seconds, sent_bytes_per_second=sent / seconds
            )
    return SystemStats(
        cpu_percent=_busy_percent(before.cpu_seconds, now.cpu_seconds),
        process_cpu_percent=None if own is None else 100 * own / seconds,
        disk_read_bytes_per_second=None if read is None else read / seconds,
        disk_written_bytes_per_second=None if written is None else written / seconds,
        network=network,
    )


def _busy_percent(before: dict[str, float], now: dict[str, float]) -> float | None:
    """Each kind of time by itself: Linux turns some of `iowait` into `idle` again, and sums of floats lose a little."""
    of_guests = ("guest", "guest_nice")  # is in `user` and `nice` too
    grown = {kind: max(0.0, now[kind] - before[kind]) for kind in now.keys() & before.keys() if kind not in of_guests}
    whole = sum(grown.values())
    return 100 * (1 - (grown.get("idle", 0.0) + grown.get("iowait", 0.0)) / whole) if whole else None


def _grown(before: float | None, now: float | None) -> float | None:
    return None if before is None or now is None or now < before else now - before


def _told(ask: Callable[[], Value]) -> Value | None:
    """None where this container or system does not tell."""
    try:
        return ask()
    except (OSError, psutil.Error, NotImplementedError, AttributeError, ValueError, IndexError, RuntimeError):
        return None


_samplers: dict[int, SystemSampler] = {}


def get_system_stats() -> SystemStats:
    """The machine as it is now: processor, memory, disk of the working directory, network by interface, GPUs.

    Rates are those since the call before. The first call of a process takes 0.1 s, to have some.
    """
    sampler: Any = _samplers.get(os.getpid())
    if sampler is None:
        _samplers.clear()
        sampler = _samplers[os.getpid()] = SystemSampler()
        time.sleep(SHORTEST_SECONDS)
    stats: SystemStats = sampler.look()
    return stats
