"""Reading what can only be iterated: from a place on, epoch after epoch, whole or one shard of it."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from trainfleet.data.samples import name_of
from trainfleet.errors import DataError

logger = logging.getLogger(__name__)


class Item(NamedTuple):
    """A sample, and which one of which epoch of its reader it is."""

    epoch: int
    number: int
    sample: Any


@dataclass(frozen=True, slots=True)
class Place:
    """Where a reader is: how far into which epoch, and the source's own state there, if it has one."""

    epoch: int = 0
    offset: int = 0
    own: Any = None


@dataclass
class Reader:
    """Samples of `source`, or of shard (index, count) of it; `epochs` of None is endless."""

    source: Any
    epochs: int | None = None
    shard: tuple[int, int] | None = None
    place: Place = field(default_factory=Place)
    _part: Any = None
    _iterator: Iterator[Any] | None = None

    def __next__(self) -> Item:
        """The next one; StopIteration after the last epoch."""
        while True:
            epoch, offset = self.place.epoch, self.place.offset
            if self.epochs is not None and epoch >= self.epochs:
                raise StopIteration
            if self._iterator is None:
                self._open()
            assert self._iterator is not None
            try:
                with _worker_info(self.source, self.shard):
                    sample = next(self._iterator)
            except StopIteration:
                self._end_epoch(epoch, offset)
                continue
            except Exception as exc:
                self._iterator = None
                raise DataError(
                    f"{self._name()} failed after {offset} samples of epoch {epoch}: {type(exc).__name__}: {exc}",
                    hint="What is only iterated cannot go on after an error; bad='skip' covers the transform alone.",
                ) from exc
            self.place = Place(epoch, offset + 1)
            return Item(epoch, offset, sample)

    def here(self) -> Place:
        """The place after the last sample, with the source's own state, to resume from."""
        own = self._part if hasattr(self._part, "state_dict") and hasattr(self._part, "load_state_dict") else None
        return Place(self.place.epoch, self.place.offset, copy.deepcopy(own.state_dict()) if own is not None else None)

    def _open(self) -> None:
        """Begin the epoch of `place`, and come to its offset: by the source's own state, or by reading again."""
        place = self.place
        if self._part is None:
            self._part = _shard_of(self.source, *self.shard) if self.shard else self.source
        if hasattr(self._part, "set_epoch"):
            self._part.set_epoch(place.epoch)
        if place.own is not None:
            self._part.load_state_dict(copy.deepcopy(place.own))
        with _worker_info(self.source, self.shard):
            self._iterator = iter(self._part)
        if place.own is None and place.offset:
            logger.info("%s has no state of its own; reading %d samples again.", self._name(), place.offset)
            with _worker_info(self.source, self.shard):
                for read in range(place.offset):
                    if next(self._iterator, self) is self:
                        raise DataError(
                            f"{self._name()} ended after {read} samples, before the {place.offset} of the saved "
                            "position. Resume with the same data, or start anew."
                        )

    def _end_epoch(self, epoch: int, offset: int) -> None:
        if offset == 0:
            again = f" in epoch {epoch}: it can be iterated only once. Give a class with __iter__" if epoch else ""
            raise DataError(f"{self._name()} yielded no sample{again or '. Check its path and its filters'}.")
        self._iterator = None
        self.place = Place(epoch + 1, 0)

    def _name(self) -> str:
        name = name_of(self.source)
        name = name[0].upper() + name[1:]
        return f"{name}, shard {self.shard[0]} of {self.shard[1]}," if self.shard else name


def check_shardable(source: Any) -> None:
    if not hasattr(source, "shard") and not _is_torch_iterable(source):
        raise DataError(
            f"shards are asked for, but {type(source).__name__} has no method shard(index, count) and is no torch "
            "IterableDataset that reads get_worker_info(). Add the method, or leave data.shards out: then every rank "
            "reads all of it and takes its share."
        )


def _shard_of(source: Any, index: int, count: int) -> Any:
    if not hasattr(source, "shard"):
        return source  # it asks get_worker_info() which part to read
    if "num_shards" in inspect.signature(source.shard).parameters:  # Hugging Face
        return source.shard(num_shards=count, index=index)
    return source.shard(index, count)


def _is_torch_iterable(source: Any) -> bool:
    return any(
        cls.__name__ == "IterableDataset" and cls.__module__.startswith("torch.") for cls in type(source).__mro__
    )


@contextmanager
def _worker_info(source: Any, shard: tuple[int, int] | None) -> Iterator[None]:
    """Answer torch's `get_worker_info()` with the shard, where the dataset shards itself by asking."""
    if shard is None or hasattr(source, "shard"):
        yield
        return
    from torch.utils.data._utils import worker as torch_worker

    before = torch_worker._worker_info
    index, count = shard
    torch_worker._worker_info = torch_worker.WorkerInfo(id=index, num_workers=count, seed=0, dataset=source)
    try:
        yield
    finally:
        torch_worker._worker_info = before
