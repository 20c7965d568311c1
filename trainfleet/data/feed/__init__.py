"""The same batches made on other hosts: feeders make what trainers ask for, and nothing is lost with either."""

from __future__ import annotations

from trainfleet.data.feed.remote import RemoteBatches
from trainfleet.data.feed.service import DataService

__all__ = ["DataService", "RemoteBatches"]
