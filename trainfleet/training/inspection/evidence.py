"""Evidence: what is kept of a finding for a replay, beside a run's metrics.

anomalies/step_000812/
  finding.json
  batch.safetensors    the micro-batches of the rank on which it arose
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainfleet.batch import Batch
from trainfleet.errors import DataError
from trainfleet.store import replacing
from trainfleet.training.inspection.fields import places_of
from trainfleet.training.inspection.finding import Finding

logger = logging.getLogger(__name__)

FOLDER = "anomalies"
BATCH = "batch.safetensors"
FINDING = "finding.json"
MOST_BYTES = 1 << 28
"""Of a batch that is kept."""
MOST_KEPT = 16
"""Findings of a run that are kept; those of a later one of the same name take their places."""


def place_for(run: Path, step: int) -> Path | None:
    """Where the evidence of a step goes; None where enough is there."""
    place = run / FOLDER / f"step_{step:06d}"
    kept = [path for path in (run / FOLDER).glob("step_*") if path != place]
    if len(kept) >= MOST_KEPT:
        logger.warning(
            "%s holds %d findings, which is enough; that of step %d is not kept.", kept[0].parent, len(kept), step
        )
        return None
    return place


def write_finding(place: Path, finding: Finding) -> bool:
    """Whether it could be written; what is in the way is a warning."""
    return _tried(place / FINDING, lambda path: path.write_text(json.dumps(finding.to_plain(), indent=2) + "\n"))


def read_finding(place: Path) -> Finding:
    """DataError where there is none that can be read."""
    try:
        return Finding.from_plain(json.loads((place / FINDING).read_text()))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{place / FINDING} holds no finding that can be read: {error}.") from error


def write_batches(place: Path, micro_batches: Sequence[Batch]) -> bool:
    """Keep the arrays of micro-batches in one file; False, and a warning, where they are too large or cannot be."""
    from safetensors.torch import save_file

    tensors, structure, size = {}, [], 0
    for i, batch in enumerate(micro_batches):
        held = []
        for j, (label, array) in enumerate(places_of(batch)):
            tensors[f"{i}/{j}"] = array.detach().to("cpu").contiguous().clone()
            held.append(label)
            size += array.numel() * array.element_size()
        structure.append(held)
    if size > MOST_BYTES:
        logger.warning(
            "The micro-batches of this step hold %d bytes, more than %d, and are not kept.", size, MOST_BYTES
        )
        return False
    told = {"places": json.dumps(structure)}
    return _tried(place / BATCH, lambda path: save_file(tensors, path, metadata=told))


def read_batches(file: Path, like: Sequence[Batch]) -> list[Batch]:
    """Micro-batches of the structure of `like`, with the arrays of a file that `write_batches` wrote.

    DataError where the file is none, or holds other arrays than these.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            structure = json.loads((opened.metadata() or {})["places"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise DataError(f"{file} holds no micro-batches that can be read: {error}.") from error
    ours = [[label for label, _ in places_of(batch)] for batch in like]
    if structure != ours:
        raise DataError(
            f"{file} holds {len(structure)} micro-batches with arrays at {_first(structure)}, but those of this run's "
            f"step are {len(ours)} with arrays at {_first(ours)}.",
            hint="Give the file that this run has saved, or leave --batch out.",
        )
    return [
        _filled(batch, {label: tensors[f"{i}/{j}"] for j, label in enumerate(ours[i])}) for i, batch in enumerate(like)
    ]


def _filled(batch: Batch, arrays: Mapping[str, Any]) -> Batch:
    from trainfleet.batch import map_arrays

    rest = iter([arrays[label] for label, _ in places_of(batch)])
    return map_arrays(lambda _: next(rest), batch)


def _first(structure: Sequence[Sequence[str]]) -> str:
    return ", ".join(place or "the batch itself" for place in structure[0][:4]) if structure else "none"


def _tried(path: Path, write: Any) -> bool:
    try:
        with replacing(path) as unfinished:
            write(unfinished)
    except Exception as error:  # also of the library that writes: a full disk must not end the run
        logger.warning("Of the finding %s is not kept: %s. The run goes on.", path.name, str(error).rstrip("."))
        return False
    return True
