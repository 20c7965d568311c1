"""Nested states as JSON, and back: every leaf comes back with its value and its type.

Plain JSON stands for itself. What JSON has not is an object with the key `$`:

    {"$": "float", "value": "nan"}                    also inf and -inf; other floats are written exactly
    {"$": "tuple", "items": [...]}
    {"$": "dict", "items": [[key, value], ...]}       keys that are integers, or begin with `$`
    {"$": "bytes", "base64": "..."}
    {"$": "scalar", "dtype": "float32", "base64": "..."}   a NumPy scalar
    {"$": "rank", "value": ...}                       PerRank
    {"$": "setting", "value": ...}                    Setting
    {"$": "array", "dtype": ..., "shape": [...], "library": "numpy" | "torch", "sharded": true | false}

The elements of an array stand in the data files, under its path: the keys from the name of the Stateful
down, joined by `/`, with `~` and `/` in keys written `~0` and `~1`.
"""

from __future__ import annotations

import base64
import enum
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from trainfleet.checkpoint.arrays import DTYPES, dtype_of, is_array, library_of, shape_of
from trainfleet.checkpoint.sealed import Damaged
from trainfleet.errors import CheckpointError
from trainfleet.state import PerRank, Setting, ShardedArray

Json: TypeAlias = Any


@dataclass(frozen=True, slots=True)
class StoredArray:
    """An array leaf of a stored state; its elements are elsewhere."""

    path: str
    dtype: str
    shape: tuple[int, ...]
    """Of the whole."""
    library: str
    sharded: bool


@dataclass(frozen=True, slots=True)
class TakenArray:
    """An array leaf of a live state."""

    path: str
    dtype: str
    array: ShardedArray | Any
    per_rank: bool


def join(path: str, key: Any) -> str:
    return f"{path}/{str(key).replace('~', '~0').replace('/', '~1')}"


def encode(value: Any, path: str, take: Callable[[TakenArray], None], *, per_rank: bool = False) -> Json:
    """The JSON of `value`; each array is handed to `take`. CheckpointError names a leaf that cannot be stored."""
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"$": "float", "value": str(value)}
    if isinstance(value, ShardedArray) or is_array(value):
        return _encode_array(value, path, take, per_rank)
    if isinstance(value, Mapping):
        items = [(key, encode(item, join(path, key), take, per_rank=per_rank)) for key, item in value.items()]
        if all(type(key) is str and not key.startswith("$") for key, _ in items):
            return dict(items)
        for key, _ in items:
            if type(key) not in (str, int):
                raise CheckpointError(f"{join(path, key)} cannot be stored: the key {key!r} is no string or integer.")
        return {"$": "dict", "items": [list(item) for item in items]}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        listed = [encode(item, join(path, i), take, per_rank=per_rank) for i, item in enumerate(value)]
        return listed if isinstance(value, list) else {"$": "tuple", "items": listed}
    if isinstance(value, PerRank) and not per_rank:
        return {"$": "rank", "value": encode(value.value, path, take, per_rank=True)}
    if isinstance(value, Setting):
        return {"$": "setting", "value": encode(value.value, path, take)}
    if isinstance(value, bytes | bytearray):
        return {"$": "bytes", "base64": base64.b64encode(value).decode()}
    if isinstance(value, np.generic) and value.dtype.kind in "biufc":
        little = np.asarray(value, value.dtype.newbyteorder("<"))
        dtype = dtype_of(little, path)
        return {"$": "scalar", "dtype": dtype, "base64": base64.b64encode(little.tobytes()).decode()}
    for base in (str, int, float):
        if isinstance(value, base) and not isinstance(value, enum.Enum | np.generic):
            return encode(base(value), path, take)  # a subclass, such as the string of torch's version
    raise CheckpointError(
        f"{path} cannot be stored: it is a {type(value).__name__}. A state holds arrays, strings, numbers, bytes, "
        "booleans, None, and dicts, lists and tuples of them."
    )


def _encode_array(value: Any, path: str, take: Callable[[TakenArray], None], per_rank: bool) -> Json:
    sharded = isinstance(value, ShardedArray)
    if sharded and per_rank:
        raise CheckpointError(f"{path} is a ShardedArray inside a PerRank; it must be one or the other.")
    local = value.local if sharded else value
    dtype = dtype_of(local, path)
    take(TakenArray(path, dtype, value, per_rank))
    shape = value.global_shape if sharded else shape_of(value)
    return {"$": "array", "dtype": dtype, "shape": list(shape), "library": library_of(local), "sharded": sharded}


def decode(node: Json, path: str) -> Any:
    """What was encoded, with StoredArray for arrays and PerRank around what was; Damaged where nothing was."""
    try:
        return _decode(node, path)
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise Damaged(f"{path}: is no state as this version writes it ({type(error).__name__}: {error})") from error


def _decode(node: Json, path: str) -> Any:
    if isinstance(node, list):
        return [_decode(item, join(path, i)) for i, item in enumerate(node)]
    if not isinstance(node, dict):
        return node
    match node.get("$"):
        case None:
            return {key: _decode(item, join(path, key)) for key, item in node.items()}
        case "float":
            return float(node["value"])
        case "tuple":
            return tuple(_decode(item, join(path, i)) for i, item in enumerate(node["items"]))
        case "dict":
            return {key: _decode(item, join(path, key)) for key, item in node["items"]}
        case "bytes":
            return base64.b64decode(node["base64"])
        case "scalar":
            data = base64.b64decode(node["base64"])
            return np.frombuffer(data, np.dtype(_known(node["dtype"])).newbyteorder("<"))[0]
        case "rank":
            return PerRank(_decode(node["value"], path))
        case "setting":
            return Setting(_decode(node["value"], path))
        case "array":
            shape = _shape(node["shape"])
            return StoredArray(path, _known(node["dtype"]), shape, node["library"], node["sharded"])
        case other:
            raise CheckpointError(f"{path} is of a kind this version does not know, {other!r}; use a newer trainfleet.")


def _known(dtype: Json) -> str:
    if dtype not in DTYPES:
        raise ValueError(f"{dtype!r} is no dtype")
    return str(dtype)


def _shape(lengths: Json) -> tuple[int, ...]:
    if not all(type(length) is int and length >= 0 for length in lengths):
        raise ValueError(f"{lengths!r} is no shape")
    return tuple(lengths)


def stored_arrays(value: Any) -> Iterator[tuple[StoredArray, bool]]:
    """Every array below a decoded value, and whether it is its rank's own."""
    if isinstance(value, StoredArray):
        yield value, False
    elif isinstance(value, PerRank):
        yield from ((array, True) for array, _ in stored_arrays(value.value))
    elif isinstance(value, dict):
        for item in value.values():
            yield from stored_arrays(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from stored_arrays(item)


def merged(first: Any, second: Any) -> Any:
    """`first`, completed by what only `second` has, key by key."""
    if isinstance(first, dict) and isinstance(second, dict):
        both = {key: merged(value, second[key]) if key in second else value for key, value in first.items()}
        return both | {key: value for key, value in second.items() if key not in first}
    return first
