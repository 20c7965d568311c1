from __future__ import annotations

import logging
import os
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from trainfleet.monitor.system.gpu import Gpus
from trainfleet.monitor.system.stats import GpuStats


class NVMLError(Exception):
    pass


class Nvml:
    """As much of the library as we use, over two GPUs, of which the second tells little."""

    NVMLError = NVMLError
    NVML_TEMPERATURE_GPU = 0

    def __init__(self, *, driver: bool = True) -> None:
        self.driver = driver
        self.begun: list[int] = []

    def nvmlInit(self) -> None:
        self.begun.append(os.getpid())
        if not self.driver:
            raise NVMLError("Driver Not Loaded")

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        return {"GPU-aa-bb": 1}[uuid]

    def nvmlDeviceGetIndex(self, handle: int) -> int:
        return handle

    def nvmlDeviceGetName(self, handle: int) -> Any:
        return b"NVIDIA H200" if handle else "NVIDIA H200"

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:
        return SimpleNamespace(gpu=37, memory=5)

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return SimpleNamespace(used=10, total=100, free=90)

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        if handle:
            raise NVMLError("Not Supported")
        return 123_456

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:
        if handle:
            raise NVMLError("GPU is lost")
        return 64


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Nvml:
    library = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", library)  # type: ignore[arg-type]
    return library


FIRST = GpuStats(index=0, name="NVIDIA H200", utilization_percent=37.0, memory_used_bytes=10, memory_total_bytes=100,
                 power_watts=123.456, temperature_celsius=64.0)  # fmt: skip
SECOND = GpuStats(index=1, name="NVIDIA H200", utilization_percent=37.0, memory_used_bytes=10, memory_total_bytes=100)


def test_every_gpu_tells_what_it_can(nvml: Nvml) -> None:
    gpus = Gpus()
    assert gpus.look() == (FIRST, SECOND) == gpus.look()
    assert len(nvml.begun) == 1


def test_of_a_rank_it_is_the_one_that_torch_uses_whatever_cuda_calls_it(
    nvml: Nvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = SimpleNamespace(
        is_initialized=lambda: True,
        get_device_properties=lambda device: {"cuda:0": SimpleNamespace(uuid="aa-bb")}[device],
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))  # type: ignore[arg-type]
    assert Gpus("cuda:0").look() == (SECOND,)


def test_without_a_driver_there_are_none(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(driver=False))  # type: ignore[arg-type]
    assert Gpus().look() == () and caplog.messages == []


def test_without_the_library_it_is_said_once_where_a_gpu_is_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert Gpus().look() == () and caplog.messages == []
    used = Gpus("cuda:0")
    with caplog.at_level(logging.WARNING):
        assert used.look() == used.look() == ()
    (message,) = caplog.messages
    assert 'pip install "trainfleet[monitor]"' in message


def test_a_forked_process_begins_anew(nvml: Nvml) -> None:
    gpus = Gpus()
    gpus.look()
    if (child := os.fork()) == 0:
        os._exit(0 if gpus.look() == (FIRST, SECOND) and nvml.begun[-1] == os.getpid() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
