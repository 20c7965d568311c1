"""One thread computes for all connections, a batch of each in turn, so that none waits for another's whole queue."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias

from trainfleet.batch import Batch
from trainfleet.errors import DataError, OutOfMemory, TrainfleetError
from trainfleet.imports import imported
from trainfleet.serve.terms import Answer, Terms

logger = logging.getLogger(__name__)


class Finished(NamedTuple):
    """What came of a batch."""

    answer: Answer | TrainfleetError
    idle: bool
    """Nothing else is here of the same owner: it could send more at a time."""


Compute: TypeAlias = Callable[[Batch, Terms], Answer]
Done: TypeAlias = Callable[[Finished], None]


class Owner(Protocol):
    """Whose batches they are."""

    @property
    def has_room(self) -> bool:
        """Whether it may have another answer now. Called with the lock of the turns held."""


@dataclass
class _Question:
    batch: Batch
    terms: Terms
    done: Done


class Turns:
    """`submit`, `forget` and `look` may be called by any thread; `done` is called on the one that computes."""

    def __init__(self, compute: Compute) -> None:
        self.progress = 0
        """Batches that were computed, failed ones too."""
        self.num_failed = 0
        self.busy_seconds = 0.0
        self._compute = compute
        self._waiting: dict[Owner, deque[_Question]] = {}  # by owner, in the order of their turns
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="trainfleet-turns", daemon=True)
        self._thread.start()

    def submit(self, owner: Owner, batch: Batch, terms: Terms, done: Done) -> None:
        with self._changed:
            self._waiting.setdefault(owner, deque()).append(_Question(batch, terms, done))
            self._changed.notify()

    def forget(self, owner: Owner) -> None:
        """Compute no more of what `owner` asked; what is being computed is still told."""
        with self._changed:
            self._waiting.pop(owner, None)

    def look(self) -> None:
        """An owner has room again."""
        with self._changed:
            self._changed.notify()

    @property
    def waiting(self) -> int:
        """Batches that have not had their turn."""
        with self._changed:
            return sum(len(queue) for queue in self._waiting.values())

    def close(self) -> None:
        """End, after the batch that is being computed; the others stay without an answer. May be called twice."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(30)

    def _run(self) -> None:
        while True:
            with self._changed:
                while (owner := self._next()) is None and not self._closing:
                    self._changed.wait()
                if owner is None or self._closing:
                    return
                question = self._take(owner)
            answer = self._answered(question)
            with self._changed:
                idle = owner not in self._waiting
            question.done(Finished(answer, idle))
            del owner, question, answer  # not to be kept while there is nothing to do

    def _next(self) -> Owner | None:
        return next((owner for owner in self._waiting if owner.has_room), None)

    def _take(self, owner: Owner) -> _Question:
        queue = self._waiting.pop(owner)
        question = queue.popleft()
        if queue:
            self._waiting[owner] = queue  # behind the others
        return question

    def _answered(self, question: _Question) -> Answer | TrainfleetError:
        begun = time.perf_counter()
        try:
            return self._compute(question.batch, question.terms)
        except BaseException as exc:  # whatever a model does, the next batch has its turn
            self.num_failed += 1
            return told_of(exc)
        finally:
            self.busy_seconds += time.perf_counter() - begun
            self.progress += 1


def told_of(exc: BaseException) -> TrainfleetError:
    """As a sentence for who asked; without the traceback, whose frames hold tensors."""
    torch = imported("torch")
    if isinstance(exc, MemoryError) or (torch is not None and isinstance(exc, torch.cuda.OutOfMemoryError)):
        return OutOfMemory(
            f"The batch does not fit into the memory of the service's device. {str(exc)[:300]}",
            hint="Make the batches smaller. They are not cut here: the answer would not be that of the whole batch "
            "to the bit.",
        )
    if isinstance(exc, TrainfleetError):
        return type(exc)(str(exc), hint=exc.hint)
    logger.info("A batch failed: %s: %s", type(exc).__name__, exc)
    return DataError(
        f"The model failed on it: {type(exc).__name__}: {exc}",
        hint="Do its arrays have the names, shapes and dtypes that the model was trained with?",
    )
