"""Predictions: what a model says of each row of a dataset, in memory or streamed to a folder."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from trainfleet.batch import Batch
from trainfleet.errors import ConfigError
from trainfleet.serve.answer import check_names
from trainfleet.serve.answering import Meant, answering
from trainfleet.serve.columns import Columns
from trainfleet.serve.memory import free_bytes, readable, row_bytes
from trainfleet.serve.one_pass import OnePass, Told
from trainfleet.serve.terms import Answering, Terms
from trainfleet.serve.written import WrittenPredictions, write_predictions

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictions:
    """Of n rows that were kept; those of weight 0, and those below the confidence asked for, are not among them."""

    indices: NDArray[np.int64]
    """[n]: their positions in the dataset, ascending."""
    classes: NDArray[np.int32] | None = None
    """[n, k], the most probable first; None for values."""
    confidences: NDArray[np.float32] | None = None
    """[n, k], the probabilities of `classes`."""
    probabilities: NDArray[np.float32] | None = None
    """[n, C], where they were asked for."""
    values: NDArray[np.float32] | None = None
    """[n, ...], of a model that gives values."""
    names: tuple[str, ...] | None = None
    """Of the classes, as they were given."""
    rows: int
    """Answered for, kept or not."""
    estimated_bytes: int | None = None
    """Of all arrays, as known after the first batch; with a confidence, if every row were kept. None: the number of
    rows was not known."""

    @property
    def measured_bytes(self) -> int:
        """Of all arrays."""
        arrays = (self.indices, self.classes, self.confidences, self.probabilities, self.values)
        return sum(array.nbytes for array in arrays if array is not None)

    def __len__(self) -> int:
        return len(self.indices)

    def __str__(self) -> str:
        kept = f"{len(self):,} of {self.rows:,} rows"
        what = ["values"] if self.values is not None else []
        if self.classes is not None:
            what = [f"top {self.classes.shape[1]}"]
        if self.probabilities is not None:
            what.append(f"probabilities of {self.probabilities.shape[1]:,} classes")
        return f"{kept}: {', '.join(what) or 'none'}; {readable(self.measured_bytes)}"


@overload
def predict(
    model: Meant,
    batches: Iterable[Batch],
    *,
    top_k: int = 1,
    confidence: float = 0.0,
    probabilities: bool = False,
    to: None = None,
    fresh: bool = False,
    classes: Sequence[str] | None = None,
    progress: Told | None = None,
) -> Predictions: ...


@overload
def predict(
    model: Meant,
    batches: Iterable[Batch],
    *,
    top_k: int = 1,
    confidence: float = 0.0,
    probabilities: bool = False,
    to: str | Path,
    fresh: bool = False,
    classes: Sequence[str] | None = None,
    progress: Told | None = None,
) -> WrittenPredictions: ...


def predict(
    model: Meant,
    batches: Iterable[Batch],
    *,
    top_k: int = 1,
    confidence: float = 0.0,
    probabilities: bool = False,
    to: str | Path | None = None,
    fresh: bool = False,
    classes: Sequence[str] | None = None,
    progress: Told | None = None,
) -> Predictions | WrittenPredictions:
    """What `model` says of each row of one pass of `batches`, in order.

    model          as for `validate`
    batches        a stream in order, which is rewound and left after one epoch, or any iterable
    top_k          so many classes of each row, the most probable first
    confidence     rows whose best probability is below it are left out, where the model is
    probabilities  those of all classes too
    to             a folder for Parquet parts in place of arrays; then memory does not grow with the data, and after
                   any end of the process the same call goes on behind the last whole part
    fresh          begin the folder anew
    classes        their names, which go along
    progress       called with (rows done, rows in all or None)

    ConfigError before more than a batch is computed, where the arrays would not fit into memory, or the model cannot
    give what is asked; PeerError where services are gone for good; StoreError where the folder cannot be written.
    """
    terms = Terms(task="predict", top_k=int(top_k), confidence=float(confidence), probabilities=bool(probabilities))
    names = tuple(map(str, classes)) if classes is not None else None
    walk = OnePass(batches, in_order=True)
    with answering(model) as answers:
        if to is not None:
            return write_predictions(answers, walk, terms, Path(to), names=names, fresh=fresh, told=progress)
        return _in_memory(answers, walk, terms, names, progress)


def _in_memory(
    model: Answering, walk: OnePass, terms: Terms, names: tuple[str, ...] | None, told: Told | None
) -> Predictions:
    columns = Columns(walk.total)
    estimate: int | None = None
    is_first = True
    for answer, _ in walk.answers(model, terms, told):
        if is_first:
            is_first = False
            check_names(names, answer)
            if walk.total is not None:
                estimate = walk.total * row_bytes(answer)
                _refuse_too_large(estimate, terms)
        columns.add(walk.indices(answer["kept"]), answer)
    arrays: dict[str, Any] = columns.take()
    arrays.setdefault("indices", np.empty(0, np.int64))
    found = Predictions(**arrays, names=names, rows=walk.position, estimated_bytes=estimate)
    logger.info("Predictions of %s.", found)
    return found


def _refuse_too_large(estimate: int, terms: Terms) -> None:
    free = free_bytes()
    most = "at most " if terms.confidence > 0 else ""
    logger.info("Predictions take %s%s; %s are free.", most, readable(estimate), readable(free))
    if estimate > free:
        raise ConfigError(
            f"The predictions take {most}{readable(estimate)}, and {readable(free)} of memory are free.",
            hint="Give to=, a folder that they are streamed to; or leave out probabilities, or lower top_k.",
        )
