"""What was seen of a machine at one look, and the same as plain numbers by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

_OF_A_PROCESS = ("process_", "gpu/")


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuStats:
    """One GPU, as NVML tells it; None where this GPU does not tell."""

    index: int
    """As `nvidia-smi` counts; CUDA may count otherwise."""
    name: str
    utilization_percent: float | None = None
    """Of the last moments in which some kernel ran, however small."""
    memory_used_bytes: int | None = None
    """By all processes."""
    memory_total_bytes: int | None = None
    power_watts: float | None = None
    temperature_celsius: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class InterfaceStats:
    """One network interface."""

    received_bytes_per_second: float
    sent_bytes_per_second: float


@dataclass(frozen=True, kw_only=True, slots=True)
class SystemStats:
    """A machine and this process at one look. None: not known here, or, of rates, not yet."""

    cpu_percent: float | None = None
    """Of all cores of the machine together: 100 is all of them busy."""
    process_cpu_percent: float | None = None
    """Of this process, all its threads: 100 is one core."""
    memory_total_bytes: int | None = None
    memory_available_bytes: int | None = None
    """That could be had without swapping; of the container, where it may have less than the machine."""
    memory_limit_bytes: int | None = None
    """Of the container; None where it has none."""
    process_memory_bytes: int | None = None
    """Resident memory of this process."""
    disk_free_bytes: int | None = None
    """Where the run writes."""
    disk_total_bytes: int | None = None
    disk_read_bytes_per_second: float | None = None
    """Of all disks of the machine."""
    disk_written_bytes_per_second: float | None = None
    network: Mapping[str, InterfaceStats] = field(default_factory=dict)
    """By interface; without those that came since the look before."""
    gpus: tuple[GpuStats, ...] = ()

    def flat(self) -> dict[str, float]:
        """What is known, by name: `cpu_percent`, `network/eth0/sent_bytes_per_second`, `gpu/0/power_watts`.

        Of the network without the loopback, and without what carries the bytes of others: bridges and their ends.
        """
        numbers = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("network", "gpus")}
        for name, interface in self.network.items():
            if not name.startswith(_CARRYING_OTHERS):
                numbers |= {f"network/{name}/{f.name}": getattr(interface, f.name) for f in fields(interface)}
        for gpu in self.gpus:
            own = (f.name for f in fields(gpu) if f.name not in ("index", "name"))
            numbers |= {f"gpu/{gpu.index}/{name}": getattr(gpu, name) for name in own}
        return {name: value for name, value in numbers.items() if value is not None}


_CARRYING_OTHERS = ("lo", "veth", "docker", "br-", "virbr", "cni", "cali", "flannel", "ifb", "dummy", "sit", "tunl")


def of_a_rank(numbers: Mapping[str, float]) -> dict[str, float]:
    """Those that another rank of the same host does not tell as well."""
    return {name: value for name, value in numbers.items() if name.startswith(_OF_A_PROCESS)}
