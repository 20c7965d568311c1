"""A list that stays short: when it is full, every second item goes, and from then on every second one is kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Thinned(Generic[T]):
    """Holds at most `most` items of any number, evenly spread, and the last one in any case."""

    def __init__(self, most: int = 4000) -> None:
        self.num_seen = 0
        self._most = most
        self._stride = 1
        self._kept: list[T] = []  # those whose number is a multiple of the stride
        self._tail: list[T] = []  # the last one, where it is not among them

    def append(self, item: T) -> None:
        if self.num_seen % self._stride == 0:
            self._kept.append(item)
            if len(self._kept) >= self._most:
                self._kept = self._kept[::2]
                self._stride *= 2
        self._tail = [item] if self.num_seen % self._stride else []
        self.num_seen += 1

    @property
    def last(self) -> T | None:
        return next(iter([*self._tail, *self._kept[-1:]]), None)

    def __iter__(self) -> Iterator[T]:
        yield from self._kept
        yield from self._tail

    def __len__(self) -> int:
        return len(self._kept) + len(self._tail)
