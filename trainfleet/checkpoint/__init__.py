"""Checkpoints that are whole or do not count: saved behind the loop, verified before anything is loaded."""

from __future__ import annotations

from trainfleet.checkpoint.checkpointer import Checkpointer
from trainfleet.checkpoint.retention import Retention
from trainfleet.checkpoint.rollback import Rollback
from trainfleet.checkpoint.save import Save
from trainfleet.checkpoint.settings import CheckpointConfig

__all__ = ["CheckpointConfig", "Checkpointer", "Retention", "Rollback", "Save"]
