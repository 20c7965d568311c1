"""How two checkpoints differ: array by array, however they were cut, and value by value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainfleet.checkpoint.arrays import Bytes
from trainfleet.checkpoint.floats import FLOATS, recast
from trainfleet.checkpoint.tree import StoredArray, join
from trainfleet.checkpoint.whole import Whole
from trainfleet.state import PerRank, Setting


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    path: str
    what: str
    """In words."""
    largest: float | None = None
    """The largest difference of two elements, where both arrays hold numbers of one shape."""
    elements: int | None = None
    """How many elements differ."""


def differences(first: Whole, second: Whole, state: str | None = None) -> Iterator[Difference]:
    """All of them, in `state` or everywhere. Equal means equal to the bit. Memory is that of two arrays."""
    here, there = first.states, second.states
    if state is not None:
        here = {name: value for name, value in here.items() if name == state}
        there = {name: value for name, value in there.items() if name == state}
    yield from _of_mappings(here, there, "", first, second)


def _of_mappings(
    here: Mapping[Any, Any], there: Mapping[Any, Any], path: str, first: Whole, second: Whole
) -> Iterator[Difference]:
    for key in [*here, *(key for key in there if key not in here)]:
        below = join(path, key) if path else str(key)
        if key not in there:
            yield Difference(path=below, what="only in the first")
        elif key not in here:
            yield Difference(path=below, what="only in the second")
        else:
            yield from _of_values(here[key], there[key], below, first, second)


def _of_values(here: Any, there: Any, path: str, first: Whole, second: Whole) -> Iterator[Difference]:
    here, there = _bare(here), _bare(there)
    if isinstance(here, StoredArray) and isinstance(there, StoredArray):
        yield from _of_arrays(here, there, path, first, second)
    elif isinstance(here, dict) and isinstance(there, dict):
        yield from _of_mappings(here, there, path, first, second)
    elif isinstance(here, list | tuple) and isinstance(there, list | tuple):
        yield from _of_mappings(dict(enumerate(here)), dict(enumerate(there)), path, first, second)
    elif type(here) is not type(there) or here != there:
        yield Difference(path=path, what=f"{_shown(here)} in the first and {_shown(there)} in the second")


def _of_arrays(here: StoredArray, there: StoredArray, path: str, first: Whole, second: Whole) -> Iterator[Difference]:
    if here.shape != there.shape:
        yield Difference(path=path, what=f"of shape {here.shape} in the first and {there.shape} in the second")
        return
    a, b = first.read_own(here), second.read_own(there)
    if here.dtype == there.dtype and np.array_equal(a, b):
        return
    gap = _gap(a, b, here, there)
    what = f"{gap['elements']} of {_count(here)} elements differ"
    if gap["largest"] is not None:
        what += f", by {gap['largest']:.3g} at most"
    if here.dtype != there.dtype:
        what = f"{here.dtype} in the first and {there.dtype} in the second; {what}"
    yield Difference(path=path, what=what, **gap)


def _count(array: StoredArray) -> int:
    return int(np.prod(array.shape, dtype=np.int64))


def _gap(a: Bytes, b: Bytes, here: StoredArray, there: StoredArray) -> dict[str, Any]:
    x, y = _numbers(a, here.dtype), _numbers(b, there.dtype)
    if x is None or y is None:
        size = max(1, _count(here))
        unlike = (a.reshape(size, -1) != b.reshape(size, -1)).any(1) if a.size == b.size else np.ones(size, bool)
        return {"largest": None, "elements": int(unlike.sum())}
    with np.errstate(invalid="ignore"):
        unlike = (x != y) & ~(np.isnan(x) & np.isnan(y))
        largest = float(np.max(np.abs(x - y), where=unlike, initial=0.0))
    bits = unlike if here.dtype != there.dtype else (a.reshape(len(x), -1) != b.reshape(len(y), -1)).any(1)
    return {"largest": largest, "elements": int(bits.sum())}


def _numbers(data: Bytes, dtype: str) -> NDArray[np.float64] | None:
    """The elements as float64; None for what has no such numbers."""
    if dtype in FLOATS:
        return recast(data, dtype, "float64").view("<f8")
    try:
        kind = np.dtype(dtype).newbyteorder("<")
    except TypeError:
        return None
    return None if kind.kind == "c" else data.view(kind).astype(np.float64)


def _bare(value: Any) -> Any:
    return value.value if isinstance(value, PerRank | Setting) else value


def _shown(value: Any) -> str:
    if isinstance(value, StoredArray):
        return f"an array of {value.dtype} {list(value.shape)}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
