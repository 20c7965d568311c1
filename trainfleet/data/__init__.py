"""Where batches come from: sources by index, one global order, and workers that make batches ahead."""

from __future__ import annotations

from trainfleet.data.config import BatchConfig, DataConfig, SourceConfig
from trainfleet.data.iterable import IterableBatches
from trainfleet.data.loader import LocalBatches
from trainfleet.data.order import indices_at
from trainfleet.data.sampler import Sampler
from trainfleet.data.source import Source, open_source

__all__ = [
    "BatchConfig",
    "DataConfig",
    "IterableBatches",
    "LocalBatches",
    "Sampler",
    "Source",
    "SourceConfig",
    "indices_at",
    "open_source",
]
