"""Bodies that are one dict of arrays, as nearly every batch is: known by their look when sent, taken apart once here.

After 1 MiB of payload the interpreter's own code is no longer in a core's caches, so a frame costs by how much of it
runs: to walk through structures that are all alike was a good part of that.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from trainfleet.errors import PeerError
from trainfleet.net.structure import Bytes, padded

Look: TypeAlias = tuple[tuple[str, Any, tuple[int, ...]], ...]
"""Key, dtype and shape of each array of a dict that has nothing else: bodies of one look have one structure."""


def look_of(value: Any) -> Look | None:
    """None for whatever is not a dict of arrays by strings."""
    if type(value) is not dict:
        return None
    look = []
    for key, array in value.items():
        if type(key) is not str or type(array) is not np.ndarray:
            return None
        look.append((key, array.dtype, array.shape))
    return tuple(look)


class Flat(NamedTuple):
    """A structure that is one dict of arrays, taken apart once, when it first came."""

    arrays: list[tuple[str, np.dtype[Any], list[int], int]]
    """Key, dtype, shape, and where in the payload it begins."""

    @classmethod
    def of(cls, tree: Any) -> Flat | None:
        """Of a tree that has passed `survey`; None for others, booleans (each is looked at) and nothing."""
        if type(tree) is not dict or not tree:
            return None
        arrays, begin = [], 0
        for key, node in tree.items():
            if type(node) is not list or node[0] != "a":
                return None
            dtype, shape = np.dtype(node[1]), node[2]
            num_bytes = math.prod(shape) * dtype.itemsize
            if dtype.kind == "b" or not num_bytes:
                return None
            arrays.append((key, dtype, shape, begin))
            begin = padded(begin + num_bytes)
        return cls(arrays)

    def build(self, memory: Bytes) -> dict[str, Any]:
        """As `structure.build` would, with one call for each array."""
        try:
            return {key: np.ndarray(shape, dtype, memory, begin) for key, dtype, shape, begin in self.arrays}
        except (TypeError, ValueError) as exc:
            raise PeerError(f"A frame has a body that cannot be built: {exc}.") from exc
