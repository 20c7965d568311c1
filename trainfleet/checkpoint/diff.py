"""How two checkpoints differ: array by array, however they were cut, and value by value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainfleet.checkpoint.arrays import DTYPES, Bytes
from trainfleet.checkpoint.floats import FLOATS, recast
from trainfleet.checkpoint.tree import StoredArray, join
from trainfleet.checkpoint.whole import Whole
from trainfleet.state import PerRank, Setting

_CHUNK = 1 << 17  # elements compared at once


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    path: str
    what: str
    """In words."""
    largest: float | None = None
    """The largest difference of two elements, where both arrays hold numbers of one shape."""
    elements: int | None = None
    """How many elements differ."""
    rank: int | None = None
    """Whose own value it is, where each rank has its own."""


def differences(first: Whole, second: Whole, state: str | None = None) -> Iterator[Difference]:
    """All of them, in `state` or everywhere. Equal means equal to the bit. Memory is that of two arrays.

    What each rank has of its own is compared rank by rank, as far as both checkpoints have that rank.
    """
    yield from _of_mappings(_Side(first), _Side(second), _only(first.states, state), _only(second.states, state), "")
    for rank in range(1, min(first.num_ranks, second.num_ranks)):
        here, there = first.states_of(rank), second.states_of(rank)
        one, other = _Side(first, rank), _Side(second, rank)
        yield from _of_own_values(one, other, _only(here, state), _only(there, state), "")


def value_differences(here: Mapping[str, Any], there: Mapping[str, Any], path: str) -> list[Difference]:
    """How two mappings without arrays differ, such as metadata."""
    nobody: Any = None
    return list(_of_mappings(nobody, nobody, here, there, path))


@dataclass(frozen=True, slots=True)
class _Side:
    """One of the two checkpoints, and whose own values are meant."""

    whole: Whole
    rank: int | None = None

    def read(self, array: StoredArray) -> Bytes:
        return self.whole.read_own(array) if self.rank is None else self.whole.read(array, rank=self.rank)


def _only(states: Mapping[str, Any], state: str | None) -> dict[str, Any]:
    return {name: value for name, value in states.items() if state in (None, name)}


def _of_own_values(one: _Side, other: _Side, here: Any, there: Any, path: str) -> Iterator[Difference]:
    """Of the ranks after the first: what is each rank's own; the rest is compared already."""
    if isinstance(here, PerRank) and isinstance(there, PerRank):
        yield from _of_values(one, other, here, there, path)
    elif isinstance(here, Mapping) and isinstance(there, Mapping):
        for key in here:
            if key in there:
                yield from _of_own_values(one, other, here[key], there[key], join(path, key) if path else str(key))
    elif isinstance(here, list | tuple) and isinstance(there, list | tuple):
        for i, (a, b) in enumerate(zip(here, there)):
            yield from _of_own_values(one, other, a, b, join(path, i))


def _of_mappings(
    one: _Side, other: _Side, here: Mapping[Any, Any], there: Mapping[Any, Any], path: str
) -> Iterator[Difference]:
    rank = one.rank if one else None
    for key in [*here, *(key for key in there if key not in here)]:
        below = join(path, key) if path else str(key)
        if key not in there:
            yield Difference(path=below, what="only in the first", rank=rank)
        elif key not in here:
            yield Difference(path=below, what="only in the second", rank=rank)
        else:
            yield from _of_values(one, other, here[key], there[key], below)


def _of_values(one: _Side, other: _Side, here: Any, there: Any, path: str) -> Iterator[Difference]:
    here, there = _bare(here), _bare(there)
    if isinstance(here, StoredArray) and isinstance(there, StoredArray):
        yield from _of_arrays(one, other, here, there, path)
    elif isinstance(here, dict) and isinstance(there, dict):
        yield from _of_mappings(one, other, here, there, path)
    elif isinstance(here, list | tuple) and isinstance(there, list | tuple):
        yield from _of_mappings(one, other, dict(enumerate(here)), dict(enumerate(there)), path)
    elif type(here) is not type(there) or not _equal(here, there):
        what = f"{_shown(here)} in the first and {_shown(there)} in the second"
        yield Difference(path=path, what=what, rank=one.rank if one else None)


def _of_arrays(one: _Side, other: _Side, here: StoredArray, there: StoredArray, path: str) -> Iterator[Difference]:
    if here.shape != there.shape:
        what = f"of shape {here.shape} in the first and {there.shape} in the second"
        yield Difference(path=path, what=what, rank=one.rank)
        return
    a, b = one.read(here), other.read(there)
    if here.dtype == there.dtype and _same(a, b):
        return
    largest, elements = _gap(a, b, here.dtype, there.dtype)
    what = f"{elements} of {a.size // DTYPES[here.dtype].itemsize} elements differ"
    if largest is not None:
        what += f", by {largest:.3g} at most"
    if here.dtype != there.dtype:
        what = f"{here.dtype} in the first and {there.dtype} in the second; {what}"
    yield Difference(path=path, what=what, largest=largest, elements=elements, rank=one.rank)


def _same(a: Bytes, b: Bytes) -> bool:
    return all(np.array_equal(a[at : at + _CHUNK], b[at : at + _CHUNK]) for at in range(0, a.size, _CHUNK))


def _gap(a: Bytes, b: Bytes, here: str, there: str) -> tuple[float | None, int]:
    """The largest difference of two elements, None for what are no real numbers; and how many elements differ.

    Of one dtype, elements differ that differ in a bit; of two, those that are not the same number.
    """
    wide, slim = DTYPES[here].itemsize, DTYPES[there].itemsize
    largest: float | None = 0.0
    elements = 0
    for start in range(0, a.size // wide, _CHUNK):
        x, y = a[start * wide : (start + _CHUNK) * wide], b[start * slim : (start + _CHUNK) * slim]
        apart = _apart(x, y, here, there)
        if apart is None:
            largest = None
        elif largest is not None:
            largest = float(np.fmax(largest, np.fmax.reduce(apart, initial=0.0)))
        if here == there:
            elements += int((x.reshape(-1, wide) != y.reshape(-1, slim)).any(1).sum())
        else:
            elements += len(x) // wide if apart is None else int(np.count_nonzero(apart))
    return largest, elements


def _apart(x: Bytes, y: Bytes, here: str, there: str) -> NDArray[np.float64] | None:
    """How far apart the elements are; nan where only one is a number."""
    kinds = {_kind(here), _kind(there)}
    if "" in kinds:
        return None
    if here == there and kinds == {"integer"}:  # exact, where float64 would round
        dtype = np.dtype(here).newbyteorder("<")
        p, q = x.view(dtype), y.view(dtype)
        size = np.dtype(f"u{dtype.itemsize}")
        large: NDArray[np.float64] = np.where(p > q, p.astype(size) - q.astype(size), q.astype(size) - p.astype(size))
        return large.astype(np.float64)
    p, q = _floats(x, here), _floats(y, there)
    with np.errstate(invalid="ignore"):
        apart: NDArray[np.float64] = np.abs(p - q)
    apart[(p == q) | (np.isnan(p) & np.isnan(q))] = 0.0
    return apart


def _kind(dtype: str) -> str:
    if dtype in FLOATS:
        return "float"
    return "integer" if dtype == "bool" or "int" in dtype else ""


def _floats(data: Bytes, dtype: str) -> NDArray[np.float64]:
    if dtype in FLOATS:
        return recast(data, dtype, "float64").view("<f8")
    return data.view(np.dtype(dtype).newbyteorder("<")).astype(np.float64)


def _equal(here: Any, there: Any) -> bool:
    return bool(here == there or (here != here and there != there))  # nan is nan


def _bare(value: Any) -> Any:
    return value.value if isinstance(value, PerRank | Setting) else value


def _shown(value: Any) -> str:
    if isinstance(value, StoredArray):
        return f"an array of {value.dtype} {list(value.shape)}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
