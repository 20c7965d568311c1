"""A pipeline's rank without its peers: for tests of what needs no messages."""

from __future__ import annotations

from typing import Any


class Alone:
    """A Group of `size` ranks of which only one is there; what the others say is given."""

    def __init__(self, rank: int, size: int, others: Any = None) -> None:
        self.rank, self.size, self._others = rank, size, others

    def exchange(self, value: Any) -> list[Any]:
        return [value if rank == self.rank else self._others for rank in range(self.size)]


class AloneMesh:
    """The mesh of such a rank."""

    device = "cpu"
    is_main = False

    def __init__(self, rank: int, size: int, others: Any = None) -> None:
        self._group = Alone(rank, size, others)

    def __getitem__(self, axis: str) -> Alone:
        assert axis == "pp"
        return self._group
