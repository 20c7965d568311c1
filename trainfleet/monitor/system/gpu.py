"""GPUs as NVML sees them: it asks the driver, needs no torch, and disturbs nobody."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

from trainfleet.deps import require
from trainfleet.errors import DependencyError
from trainfleet.imports import imported
from trainfleet.monitor.system.stats import GpuStats

logger = logging.getLogger(__name__)


class Gpus:
    """Those of the machine, or the one that torch calls `device`, such as `cuda:1`. Nothing is asked before `look`."""

    def __init__(self, device: str | None = None) -> None:
        self._device = device
        self._process = -1
        self._handles: list[tuple[int, str, Any]] = []
        self._library: Any = None

    def look(self) -> tuple[GpuStats, ...]:
        """None of them where there is no driver or no library, which is said once if torch uses a GPU."""
        if self._process != os.getpid():  # a forked process has to begin anew
            self._process = os.getpid()
            self._open()
        return tuple(self._look_at(*each) for each in self._handles)

    def _open(self) -> None:
        self._handles = []
        try:
            self._library = library = require("pynvml", "monitor", purpose="Looking at GPUs")
        except DependencyError as exc:
            if self._device is not None:
                logger.warning("%s The run goes on without power and temperature of its GPUs.", exc)
            return
        try:
            library.nvmlInit()
            self._handles = [self._described(handle) for handle in self._find()]
        except library.NVMLError as exc:
            logger.log(logging.WARNING if self._device is not None else logging.DEBUG, "NVML sees no GPU here: %s", exc)

    def _find(self) -> list[Any]:
        library = self._library
        if self._device is None:
            return [library.nvmlDeviceGetHandleByIndex(index) for index in range(library.nvmlDeviceGetCount())]
        torch: Any = imported("torch")
        if torch is None or not torch.cuda.is_initialized():
            return []
        return [library.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(self._device).uuid}")]

    def _described(self, handle: Any) -> tuple[int, str, Any]:
        name = self._library.nvmlDeviceGetName(handle)
        return (
            int(self._library.nvmlDeviceGetIndex(handle)),
            name.decode(errors="replace") if isinstance(name, bytes) else str(name),
            handle,
        )

    def _look_at(self, index: int, name: str, handle: Any) -> GpuStats:
        library = self._library

        def told(ask: Callable[[], Any]) -> Any:
            """None where this GPU, driver or container does not tell."""
            try:
                return ask()
            except library.NVMLError:
                return None

        rates = told(lambda: library.nvmlDeviceGetUtilizationRates(handle))
        memory = told(lambda: library.nvmlDeviceGetMemoryInfo(handle))
        milliwatts = told(lambda: library.nvmlDeviceGetPowerUsage(handle))
        celsius = told(lambda: library.nvmlDeviceGetTemperature(handle, library.NVML_TEMPERATURE_GPU))
        return GpuStats(
            index=index,
            name=name,
            utilization_percent=None if rates is None else float(rates.gpu),
            memory_used_bytes=None if memory is None else int(memory.used),
            memory_total_bytes=None if memory is None else int(memory.total),
            power_watts=None if milliwatts is None else milliwatts / 1000,
            temperature_celsius=None if celsius is None else float(celsius),
        )
