"""Weights that others saved: safetensors, files of torch.save, PyTorch's distributed checkpoints (DCP).

Nothing here runs what a file says, and no number in a file is believed before it has been held against the rest.
"""

from __future__ import annotations

from trainfleet.checkpoint.foreign.into_store import import_arrays, import_states
from trainfleet.checkpoint.foreign.pieces import ForeignArray, ForeignPiece
from trainfleet.checkpoint.foreign.source import Foreign, is_foreign, open_foreign

__all__ = ["Foreign", "ForeignArray", "ForeignPiece", "import_arrays", "import_states", "is_foreign", "open_foreign"]
