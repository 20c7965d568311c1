"""Predictions streamed to a folder: a run that goes on behind the last whole part, whatever ended it."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainfleet.errors import ConfigError
from trainfleet.serve.about import ABOUT, About
from trainfleet.serve.answer import check_names
from trainfleet.serve.columns import Columns
from trainfleet.serve.memory import readable
from trainfleet.serve.one_pass import OnePass, Told
from trainfleet.serve.parquet import Part, part_files, read_columns, read_parts, refuse_without_pyarrow, write_part
from trainfleet.serve.terms import Answering, Terms
from trainfleet.store.file import FileStore

if TYPE_CHECKING:
    from trainfleet.serve.predictions import Predictions

logger = logging.getLogger(__name__)

PART_ROWS = 1 << 16
PART_BYTES = 32 << 20
"""Of the arrays of a part, whichever is reached first; a part holds whole batches."""
PART_SECONDS = 60.0
"""A slow model commits what it has: no more than this, and a batch, is computed again after a kill."""


@dataclass(frozen=True, kw_only=True)
class WrittenPredictions:
    """A folder that holds them all, as one Parquet table in parts.

    Columns: `index` int64; `class` int32 and `confidence` float32, or lists `classes` and `confidences` where top_k is
    more than 1; `probabilities` list of float32; of values `value` float32, or `values`.
    """

    folder: Path
    rows: int
    """Answered for, kept or not."""
    kept: int
    """Rows of the table."""
    num_bytes: int
    """Of all parts on disk."""
    computed: int
    """Rows answered for by this call; the others were there."""

    def __len__(self) -> int:
        return self.kept

    def __str__(self) -> str:
        before = f", of which {self.rows - self.computed:,} were there" if self.computed < self.rows else ""
        return f"{self.kept:,} of {self.rows:,} rows{before}; {readable(self.num_bytes)} in {self.folder}"

    def load(self) -> Predictions:
        """All of them in memory."""
        return load_predictions(self.folder)


def load_predictions(folder: str | Path) -> Predictions:
    """The predictions of a folder; of one that is not done, those of its whole parts.

    DataError names a part that is damaged.
    """
    from trainfleet.serve.predictions import Predictions

    folder = Path(folder)
    about = _read_about(folder)
    if about is None:
        raise ConfigError(f"There are no predictions in {folder}: it has no {ABOUT}.")
    columns: dict[str, Any] = {}
    parts = list(read_parts(folder))
    kept, row = sum(part.kept for _, part in parts), 0
    for path, part in parts:
        for name, column in read_columns(path, part).items():
            whole = columns.setdefault(name, np.empty((kept, *column.shape[1:]), column.dtype))
            whole[row : row + part.kept] = column
        row += part.kept
    columns.setdefault("indices", np.empty(0, np.int64))
    return Predictions(**columns, names=about.names, rows=parts[-1][1].end if parts else 0)


def write_predictions(
    model: Answering,
    walk: OnePass,
    terms: Terms,
    folder: Path,
    *,
    names: tuple[str, ...] | None,
    fresh: bool,
    told: Told | None,
) -> WrittenPredictions:
    """As `predict` with `to`. What is there is verified first; then the stream is set behind it."""
    refuse_without_pyarrow()
    wanted = About(weights=model.digest, terms=terms, first=walk.first_digest(), samples=walk.total, names=names)
    with _held(folder) as store:
        if fresh:
            _clear(folder, store)
        present = _read_about(folder)
        if present is not None:
            present.refuse_other(wanted, folder)
        elif left := part_files(folder):
            raise ConfigError(
                f"{folder} holds {left[0].name}, and no {ABOUT} that says what it is of.",
                hint="Name another folder, or begin this one anew with --fresh (fresh=True).",
            )
        else:
            store.put(ABOUT, wanted.to_json().encode())
        parts = _parts_of(folder, wanted)
        if parts and not (present is not None and present.is_done):
            logger.info("%s holds the first %d rows; going on behind them.", folder, parts[-1].end)
        kept, begin = sum(part.kept for part in parts), parts[-1].end if parts else 0
        if present is None or not present.is_done or present.rows != begin:
            if parts:
                walk.skip_to(begin, parts[-1].state)
            writing = _Writing(store, wanted.digest, number=len(parts), begin=begin)
            writing.run(model, walk, terms, names, told)
            kept += writing.kept
            done = dataclasses.replace(wanted, rows=walk.position, kept=kept)
            store.put(ABOUT, done.to_json().encode())
        else:
            walk.position = begin
    size = sum(path.stat().st_size for path in part_files(folder))
    return WrittenPredictions(
        folder=folder, rows=walk.position, kept=kept, num_bytes=size, computed=walk.position - begin
    )


class _Writing:
    """Collects rows and commits them part by part."""

    def __init__(self, store: FileStore, of: str, *, number: int, begin: int) -> None:
        self._store, self._of, self._number, self._begin = store, of, number, begin
        self._columns = Columns()
        # Rows collected, where their batches end, and the state there: set in one act, as Ctrl-C comes at any moment.
        self._whole: tuple[int, int, Any] = (0, begin, None)
        self._is_committing = False
        self._since = time.monotonic()
        self.kept = 0

    def run(
        self, model: Answering, walk: OnePass, terms: Terms, names: tuple[str, ...] | None, told: Told | None
    ) -> None:
        """To the end of the pass. Whatever ends it before, what was answered is committed, if it can be."""
        try:
            for answer, state in walk.answers(model, terms, told):
                check_names(names, answer)
                self._columns.add(walk.indices(answer["kept"]), answer)
                self._whole = (self._columns.rows, walk.position + int(answer["rows"]), state)
                late = time.monotonic() - self._since > PART_SECONDS
                if self._columns.rows >= PART_ROWS or self._columns.num_bytes >= PART_BYTES or late:
                    self._commit()
            self._commit()
        except BaseException:
            if not self._is_committing:
                self._commit()
            raise

    def _commit(self) -> None:
        rows, end, state = self._whole
        if end == self._begin:
            return
        self._is_committing = True
        part = Part(of=self._of, begin=self._begin, end=end, kept=rows, state=state)
        columns = {name: column[:rows] for name, column in self._columns.take().items()}
        write_part(self._store, self._number, part, columns)
        self._number += 1
        self._begin, self.kept = end, self.kept + rows
        self._whole = (0, end, state)
        self._since = time.monotonic()
        self._is_committing = False


def _parts_of(folder: Path, about: About) -> list[Part]:
    parts = []
    for path, part in read_parts(folder):
        if part.of != about.digest:
            raise ConfigError(
                f"{path} is of other weights, terms or data than {ABOUT} beside it.",
                hint="Name another folder, or begin this one anew with --fresh (fresh=True).",
            )
        parts.append(part)
    return parts


def _read_about(folder: Path) -> About | None:
    path = folder / ABOUT
    if not path.is_file():
        return None
    return About.from_json(FileStore(folder).get(ABOUT), path)


@contextmanager
def _held(folder: Path) -> Iterator[FileStore]:
    """The folder as a store, for this process alone."""
    store = FileStore(folder)
    hold = store.hold()
    try:
        yield store
    finally:
        hold.close()


def _clear(folder: Path, store: FileStore) -> None:
    # From the last to the first, and what they are of at the end: a kill in between leaves a run that is broken off.
    for path in reversed(part_files(folder)):
        store.delete(path.name)
    store.delete(ABOUT)
