"""What predictions take is known before, and what there is to take."""

from __future__ import annotations

import numpy as np
import psutil

from trainfleet.serve import memory
from trainfleet.serve.memory import free_bytes, readable, row_bytes


def test_a_row_takes_its_index_and_its_part_of_every_column():
    answer = {"kept": np.zeros(5, np.int32), "classes": np.zeros((5, 3), np.int32), "rows": np.array(9)}
    answer |= {"confidences": np.zeros((5, 3), np.float32), "probabilities": np.zeros((5, 1000), np.float32)}
    assert row_bytes(answer) == 8 + 12 + 12 + 4000
    assert row_bytes({"values": np.zeros(0, np.float32)}) == 12


def test_a_container_may_have_less_than_the_machine(monkeypatch):
    monkeypatch.setattr(memory, "memory_left", lambda: None)
    assert abs(free_bytes() - psutil.virtual_memory().available) < 2 << 30
    monkeypatch.setattr(memory, "memory_left", lambda: 2_001_000)
    assert free_bytes() == 2_001_000


def test_bytes_are_readable():
    assert readable(1_600_000) == "1.6 MB" and readable(2_345_000_000) == "2.35 GB" and readable(7100) == "7 kB"
