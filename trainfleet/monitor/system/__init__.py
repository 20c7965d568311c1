"""The machine under a run: processor, memory, disk, network, GPUs."""

from trainfleet.monitor.system.sampler import SystemSampler, get_system_stats
from trainfleet.monitor.system.stats import GpuStats, InterfaceStats, SystemStats

__all__ = ["GpuStats", "InterfaceStats", "SystemSampler", "SystemStats", "get_system_stats"]
