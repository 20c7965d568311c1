"""See what a run does: observers that print, write and draw its events."""

from trainfleet.monitor.alerts import Alert, Alerts
from trainfleet.monitor.console import Console
from trainfleet.monitor.csv_table import CsvTable
from trainfleet.monitor.curve import LossCurve
from trainfleet.monitor.jsonl import JsonLines, read_events, read_metrics
from trainfleet.monitor.memory import private_bytes, resident_bytes, used_bytes
from trainfleet.monitor.observers import MonitorConfig, observers_for, system_numbers
from trainfleet.monitor.profiling.memory_profiler import MemoryProfiler
from trainfleet.monitor.profiling.memory_report import MemoryReport
from trainfleet.monitor.run_folder import RunFolder
from trainfleet.monitor.samples import Samples
from trainfleet.monitor.services import Mlflow, Prometheus, WandB
from trainfleet.monitor.system import SystemSampler, SystemStats, get_system_stats
from trainfleet.monitor.tensorboard import TensorBoard
from trainfleet.monitor.throughput import Smoothed, Throughput

__all__ = [
    "Alert",
    "Alerts",
    "Console",
    "CsvTable",
    "JsonLines",
    "LossCurve",
    "MemoryProfiler",
    "MemoryReport",
    "Mlflow",
    "MonitorConfig",
    "Prometheus",
    "RunFolder",
    "Samples",
    "Smoothed",
    "SystemSampler",
    "SystemStats",
    "TensorBoard",
    "Throughput",
    "WandB",
    "get_system_stats",
    "observers_for",
    "private_bytes",
    "read_events",
    "read_metrics",
    "resident_bytes",
    "system_numbers",
    "used_bytes",
]
