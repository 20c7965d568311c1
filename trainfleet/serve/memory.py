"""What predictions take in memory, and what there is."""

from __future__ import annotations

import psutil

from trainfleet.container import memory_left
from trainfleet.serve.terms import Answer

INDEX_BYTES = 8
COLUMNS = ("classes", "confidences", "probabilities", "values")
"""Of an answer, beside the index of each row."""


def row_bytes(answer: Answer) -> int:
    """Bytes of one row of predictions: its index, and its part of each array of the answer."""
    columns = (answer[name] for name in COLUMNS if name in answer)
    size = INDEX_BYTES
    for column in columns:
        elements = 1
        for length in column.shape[1:]:
            elements *= length
        size += elements * column.itemsize
    return size


def free_bytes() -> int:
    """Memory that can be had: of the machine, or of the container where that has less."""
    free, left = psutil.virtual_memory().available, memory_left()
    return free if left is None else min(free, left)


def readable(num_bytes: float) -> str:
    """`7 kB`, `412.0 MB`, `1.24 GB`: decimal units."""
    if num_bytes >= 1e9:
        return f"{num_bytes / 1e9:,.2f} GB"
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:,.0f} kB"
