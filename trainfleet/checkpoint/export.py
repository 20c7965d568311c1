"""Weights for others: whole arrays as safetensors files, which load without trainfleet.

A safetensors file is 8 bytes with the length of a JSON header, the header, and the bytes of the arrays. It is made
array by array, read from the shards and verified, so that the model never has to fit into memory.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from typing import Literal, TypeAlias

from trainfleet.checkpoint.arrays import DTYPES, num_bytes
from trainfleet.checkpoint.floats import FLOATS, recast
from trainfleet.checkpoint.shard import Index
from trainfleet.checkpoint.tree import StoredArray
from trainfleet.checkpoint.whole import Whole
from trainfleet.errors import CheckpointError
from trainfleet.store import Buffer, Store

Float: TypeAlias = Literal["float32", "bfloat16", "float16"]

PRECISIONS: dict[str, Float] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""Dtypes by the words of a plan."""


def safetensors_of(
    store: Store, indexes: list[Index], *, state: str = "model", dtype: Float | None = None
) -> Iterator[Buffer]:
    """The bytes of one safetensors file with the whole arrays of `state`, by their names in it; tied ones once.

    With `dtype`, floating-point arrays are rounded to it (nearest, ties to even); others stay as they are. What is
    no array is left out. CheckpointError if there is no such state or no array in it; Damaged, in the middle, if a
    byte is not what was written.
    """
    with Whole(store, indexes) as whole:
        yield from file_of(whole, arrays_of(whole, state), dtype)


def arrays_of(whole: Whole, state: str) -> list[StoredArray]:
    """The arrays of a state; CheckpointError if it has none."""
    found = list(whole.arrays(state))
    if not found:
        has = ", ".join(whole.states)
        raise CheckpointError(f"There is no state {state!r} with arrays to export; the checkpoint holds {has}.")
    return found


def file_of(whole: Whole, arrays: Sequence[StoredArray], dtype: Float | None) -> Iterator[Buffer]:
    """One safetensors file with these arrays."""
    entries, at = {}, 0
    for array in arrays:
        kind = exported_dtype(array, dtype)
        size = num_bytes(kind, array.shape)
        code = DTYPES[kind].safetensors
        as_bytes = code == "U8" and kind != "uint8"
        shape = [size] if as_bytes else list(array.shape)
        entries[exported_name(array)] = {"dtype": code, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps({"__metadata__": {"format": "pt"}} | entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for array in arrays:
        data = recast(whole.read(array), array.dtype, exported_dtype(array, dtype))
        if data.size:
            yield data.data


def groups_of(arrays: Sequence[StoredArray], dtype: Float | None, most: int) -> list[list[StoredArray]]:
    """The arrays in their order, in groups of at most so many bytes; a larger one is a group of its own."""
    groups: list[list[StoredArray]] = [[]]
    size = 0
    for array in arrays:
        more = num_bytes(exported_dtype(array, dtype), array.shape)
        if groups[-1] and size + more > most:
            groups.append([])
            size = 0
        groups[-1].append(array)
        size += more
    return groups


def index_of(names: Sequence[str], groups: Sequence[Sequence[StoredArray]], dtype: Float | None) -> bytes:
    """The index that the Hugging Face loaders read: which of the files `names` holds which array."""
    where = {exported_name(array): name for name, group in zip(names, groups) for array in group}
    total = sum(num_bytes(exported_dtype(array, dtype), array.shape) for group in groups for array in group)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2).encode() + b"\n"


def exported_name(array: StoredArray) -> str:
    """Its name without that of the state: keys below one another are joined by a dot."""
    keys = array.path.split("/")[1:]
    return ".".join(key.replace("~1", "/").replace("~0", "~") for key in keys)


def exported_dtype(array: StoredArray, dtype: Float | None) -> str:
    return dtype if dtype is not None and array.dtype in FLOATS else array.dtype
