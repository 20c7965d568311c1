from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np

from trainfleet.monitor.memory import private_bytes, resident_bytes, used_bytes


def filled() -> mmap.mmap:
    """50 MB that this process did not have: what malloc gives it may have been its own, freed by a test before."""
    block = mmap.mmap(-1, 50_000_000)
    for _ in range(50):
        block.write(b"1" * 1_000_000)
    return block


def test_resident_memory_grows_by_what_is_filled() -> None:
    before = resident_bytes()
    with filled():
        assert 40e6 < resident_bytes() - before < 80e6


def test_a_forked_child_asks_for_itself() -> None:
    resident_bytes()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        before = resident_bytes()
        with filled():
            os.write(writer, str(resident_bytes() - before > 40e6).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 10) == b"True"


def test_a_device_that_nobody_uses_reports_resident_memory() -> None:
    assert used_bytes("cuda:0") > 0


def test_pages_of_files_are_not_private(tmp_path: Path) -> None:
    before, resident = private_bytes(), resident_bytes()
    np.ones(50_000_000, dtype=np.uint8).tofile(tmp_path / "numbers")
    mapped = np.memmap(tmp_path / "numbers", dtype=np.uint8, mode="r")
    assert mapped.sum() == 50_000_000
    assert resident_bytes() - resident > 40e6 and private_bytes() - before < 20e6
    block = np.ones(50_000_000, dtype=np.uint8)
    assert private_bytes() - before > 40e6 and block[0] == 1
