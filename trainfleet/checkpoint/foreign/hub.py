"""Weights of the Hugging Face hub: `hf:NAME` is the folder of its safetensors files, downloaded or from the cache.

HF_HOME says where the cache is, HF_HUB_OFFLINE=1 that nothing else is asked.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainfleet.deps import require
from trainfleet.errors import CheckpointError

PREFIX = "hf:"
_WANTED = ["*.safetensors", "*.safetensors.index.json"]


def is_of_hub(place: str) -> bool:
    return place.startswith(PREFIX)


def folder_of_hub(place: str) -> Path:
    """The local folder with the files of `hf:NAME`; CheckpointError where they cannot be had.

    Ranks of one host may call it together: the first of them downloads.
    """
    name = place.removeprefix(PREFIX)
    hub: Any = require("huggingface_hub", "hf", purpose="Weights of the Hugging Face hub")
    try:
        folder = Path(hub.snapshot_download(name, allow_patterns=_WANTED))
    except Exception as error:  # it raises errors of its own, of its HTTP library and of the system
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"The weights of {name!r} cannot be had from the Hugging Face hub: {reason}",
            hint="Look at the name, at HF_HOME and HF_HUB_OFFLINE; or download them elsewhere and name the folder.",
        ) from error
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(f"{name!r} has no safetensors files on the Hugging Face hub; other files are not read.")
    return folder
