"""Datasets of the Hugging Face library, from its hub or from a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainfleet.deps import require
from trainfleet.errors import DataError


def load_dataset(path: str, *, split: str | None = None, format: str | None = "numpy", **args: Any) -> Any:
    """A dataset by hub name, or from a folder that `save_to_disk` wrote. `streaming=True` gives an iterable."""
    datasets: Any = require("datasets", "hf", purpose="Reading Hugging Face datasets")
    if (Path(path) / "dataset_info.json").exists() or (Path(path) / "dataset_dict.json").exists():
        found = datasets.load_from_disk(path, **args)
    else:
        found = datasets.load_dataset(path, split=split, **args)
    if hasattr(found, "keys"):  # several splits
        if split is None:
            raise DataError(f"The dataset {path} has the splits {', '.join(found)}; say which with split=.")
        if split not in found:
            raise DataError(f"The dataset {path} has no split {split!r}; it has {', '.join(found)}.")
        found = found[split]
    return found.with_format(format) if format is not None and hasattr(found, "with_format") else found
