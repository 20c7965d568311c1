"""What is asked of a model about each batch, and who can answer: the seam between results and services."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, TypeAlias, get_args, runtime_checkable

from numpy.typing import NDArray

from trainfleet.batch import Batch
from trainfleet.errors import ConfigError, PeerError

Task: TypeAlias = Literal["validate", "predict"]

Answer: TypeAlias = dict[str, NDArray[Any]]
"""Of one batch, by name; `answer.py` says what belongs in it."""

MOST_CLASSES = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What is asked about each batch of a stream. The answer is a pure function of (weights, batch, terms).

    Raises ConfigError where the values cannot be.
    """

    task: Task
    top_k: int = 1
    """predict: so many classes of each row, the most probable first."""
    confidence: float = 0.0
    """predict: rows whose best probability is below it are not returned."""
    probabilities: bool = False
    """predict: those of all classes too."""

    def __post_init__(self) -> None:
        if self.task not in get_args(Task):
            raise ConfigError(f"The task is {self.task!r}; use 'validate' or 'predict'.")
        if not 1 <= self.top_k <= MOST_CLASSES:
            raise ConfigError(f"top_k is {self.top_k}; use a number from 1 to that of the classes.")
        if not math.isfinite(self.confidence) or not 0.0 <= self.confidence <= 1.0:
            raise ConfigError(f"confidence is {self.confidence}; it is a probability, so use a number from 0 to 1.")

    def to_plain(self) -> dict[str, Any]:
        return {**asdict(self), "confidence": float(self.confidence)}

    @classmethod
    def from_plain(cls, told: Any) -> Terms:
        """PeerError for anything that `to_plain` does not give."""
        kinds = {"task": str, "top_k": int, "confidence": float, "probabilities": bool}
        if not isinstance(told, dict) or set(told) != set(kinds):
            raise PeerError(f"A question holds {str(told)[:80]} where {', '.join(kinds)} belong.")
        for key, kind in kinds.items():
            if type(told[key]) is not kind:
                raise PeerError(f"A question holds {str(told[key])[:80]!r} as {key}, which is no {kind.__name__}.")
        try:
            return cls(**told)
        except ConfigError as error:
            raise PeerError(f"A question asks for what cannot be: {str(error)[:200]}") from error


@runtime_checkable
class Answering(Protocol):
    """A model that answers for batches: here (`Predictor`), or on other hosts (`RemoteModel`)."""

    @property
    def digest(self) -> str:
        """Of the weights: alike where the answers are alike."""

    def answers(self, batches: Iterable[Batch], terms: Terms) -> Iterator[Answer]:
        """One for each batch, in order. Lazily: batches are taken only as far ahead as its window goes."""
