"""Staging memory grows when it must, is shared by its descriptor, and is given back."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from trainfleet.checkpoint.memory import CAN_BE_SHARED, StagingMemory, mapped


@pytest.mark.parametrize(
    "shared", [False, pytest.param(True, marks=pytest.mark.skipif(not CAN_BE_SHARED, reason="no memfd here"))]
)
def test_memory_is_kept_for_what_is_no_larger(shared):
    memory = StagingMemory(shared=shared)
    first = memory.reserve(1000)
    first[:] = 7
    assert memory.reserve(500).ctypes.data == first.ctypes.data and (memory.reserve(500) == 7).all()
    assert memory.num_bytes == 1000
    assert memory.reserve(5000).size == 5000 and memory.num_bytes == 5000
    memory.close()
    assert memory.num_bytes == 0 and memory.descriptor is None


@pytest.mark.skipif(not CAN_BE_SHARED, reason="this system has no memory with a descriptor")
def test_what_is_written_is_seen_through_the_descriptor():
    memory = StagingMemory(shared=True)
    memory.reserve(100)[:] = np.arange(100, dtype=np.uint8)
    assert (mapped(memory.descriptor, 100) == np.arange(100)).all()
    before = memory.version
    memory.reserve(50)
    assert memory.version == before
    memory.reserve(200)
    assert memory.version == before + 1


@pytest.mark.skipif(not CAN_BE_SHARED, reason="this system has no memory with a descriptor")
def test_no_descriptor_is_left_behind():
    def descriptors():
        return len(list(Path("/proc/self/fd").iterdir()))

    before = descriptors()
    memory = StagingMemory(shared=True)
    for size in (10, 10_000, 1_000_000):
        memory.reserve(size)
    assert descriptors() == before + 2, "ours, and that of the mapping"
    del memory
    assert descriptors() == before


@pytest.mark.parametrize(
    "shared", [False, pytest.param(True, marks=pytest.mark.skipif(not CAN_BE_SHARED, reason="no memfd here"))]
)
def test_with_cuda_in_use_it_is_pinned_and_each_pin_is_taken_back(shared, monkeypatch):
    """CUDA is played here; tests/device has the real one."""
    pinned, acts = {}, []

    def register(address, size, flags):
        pinned[address] = size
        acts.append("pin")
        return 0

    def unregister(address):
        del pinned[address]
        acts.append("unpin")

    runtime = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=unregister)
    cuda = SimpleNamespace(is_initialized=lambda: True, cudart=lambda: runtime)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    memory = StagingMemory(shared=shared)
    first = memory.reserve(5000)
    assert pinned == {first.ctypes.data: 5000}
    second = memory.reserve(9000)
    assert pinned == {second.ctypes.data: 9000} and acts == ["pin", "unpin", "pin"]
    memory.close()
    memory.close()
    assert not pinned
    memory.reserve(10)
    del memory  # nobody closed it
    assert not pinned
