"""One pass over batches, whichever way they come, which knows where each of them ended."""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import numpy as np
import xxhash
from numpy.typing import NDArray

from trainfleet.batch import Batch, BatchStream, arrays, batch_size
from trainfleet.errors import ConfigError, DataError, PeerError
from trainfleet.serve.answer import checked_answer
from trainfleet.serve.terms import Answer, Answering, Terms

logger = logging.getLogger(__name__)

Told: TypeAlias = Callable[[int, int | None], None]
"""Told after each batch: rows answered for, and of how many, where that is known."""


class OnePass:
    """The batches of one epoch of a stream, or of any iterable, in order.

    A stream is rewound first, and left after one epoch even if it does not end by itself; one that cannot be is taken
    from where it stands to its end.
    """

    def __init__(self, batches: Iterable[Batch], *, in_order: bool) -> None:
        self.batches = batches
        self.stream = batches if isinstance(batches, BatchStream) else None
        if hasattr(batches, "rewind"):
            batches.rewind()
        self.total = _rows_of(batches)
        """Rows of the pass, where that is known."""
        self.position = 0
        """Rows answered for."""
        self._part: Any = getattr(getattr(batches, "maker", None), "part", None)
        if in_order and (getattr(batches, "shuffle", False) or getattr(batches, "world_size", 1) > 1):
            raise ConfigError(
                "The batches are shuffled or a part of the data, so a prediction could not say which sample it is of.",
                hint="Open them with shuffle=False, and for one rank.",
            )
        samples = getattr(batches, "num_samples", None)
        if self.total is not None and samples is not None and samples > self.total:
            logger.warning(
                "The last %d samples fill no batch and are left out; short='keep' takes them.", samples - self.total
            )

    def indices(self, kept: NDArray[np.int32]) -> NDArray[np.int64]:
        """Which samples of the dataset those rows of the batch at `position` are; of a part, in the whole."""
        places = kept.astype(np.int64) + self.position
        if self._part is None:
            return places
        found: NDArray[np.int64] = self._part.in_source(places)
        return found

    def first_digest(self) -> str:
        """XXH3-128 of the first row of the first batch; the stream stands at its begin afterwards."""
        stream = self.stream
        if stream is None:
            return ""
        begin = stream.state_dict()
        batch = next(stream, None)
        stream.load_state_dict(begin)
        if batch is None:
            raise DataError("There are no batches: the stream has come to its end, or is empty.")
        digest = xxhash.xxh3_128(b"" if self._part is None else repr(self._part).encode())
        for array in arrays(batch):
            row = array[:1] if len(array.shape) else array
            digest.update(f"{row.dtype}{tuple(row.shape)}".encode())
            whole = np.asarray(row.float() if "bfloat16" in str(row.dtype) else row)  # which NumPy does not know
            digest.update(repr(whole.tolist()).encode() if whole.dtype.kind == "O" else whole.tobytes())
        return digest.hexdigest()

    def skip_to(self, position: int, state: Any) -> None:
        """Go on after the first `position` rows, where `state` was taken."""
        self.position = position
        if self.stream is not None:
            self.stream.load_state_dict(state)
            return
        rows, remaining = 0, iter(self.batches)
        while rows < position:
            if (batch := next(remaining, None)) is None:
                raise DataError(f"The batches end after {rows} rows, and {position} were answered for before.")
            rows += batch_size(batch)
        self.batches = remaining

    def answers(self, model: Answering, terms: Terms, told: Told | None) -> Iterator[tuple[Answer, Any]]:
        """Each answer, checked, with the state of the stream after its batch (None without one).

        `position` is before that batch when the caller gets it, and behind it when the caller asks for the next.
        """
        taken: deque[tuple[int, Any]] = deque()
        for answer in model.answers(self._followed(taken), terms):
            checked = checked_answer(answer, terms)
            rows, state = taken.popleft()
            if int(checked["rows"]) != rows:
                raise PeerError(f"An answer is for {int(checked['rows'])} rows, and its batch has {rows}.")
            yield checked, state
            self.position += rows
            if told is not None:
                told(min(self.position, self.total or self.position), self.total)
        if taken:
            raise PeerError(f"{len(taken)} batches were left without an answer.")

    def _followed(self, taken: deque[tuple[int, Any]]) -> Iterator[Batch]:
        """A model may read ahead, so where each batch ended is written down as it is taken."""
        for batch in itertools.islice(self.stream or self.batches, self._batches_left()):
            taken.append((batch_size(batch), None if self.stream is None else self.stream.state_dict()))
            yield batch

    def _batches_left(self) -> int | None:
        batches: Any = self.batches
        if self.total is not None:
            return -(-(self.total - self.position) // int(batches.size))
        per_epoch: int | None = getattr(batches, "batches_per_epoch", None)
        return per_epoch


def _rows_of(batches: Any) -> int | None:
    """Rows of an epoch of a stream that has all of the data."""
    samples, size = getattr(batches, "num_samples", None), getattr(batches, "size", None)
    per_epoch = getattr(batches, "batches_per_epoch", None)
    if samples is None or size is None or per_epoch is None or getattr(batches, "world_size", 1) > 1:
        return None
    return int(min(samples, per_epoch * size))
