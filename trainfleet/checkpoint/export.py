"""Weights for others: whole arrays as safetensors files, which load without trainfleet.

A safetensors file is 8 bytes with the length of a JSON header, the header, and the bytes of the arrays. It is made
array by array, read from the shards and verified, so that the model never has to fit into memory.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

from trainfleet.checkpoint.arrays import DTYPES, num_bytes
from trainfleet.checkpoint.floats import FLOATS, recast
from trainfleet.checkpoint.shard import Index
from trainfleet.checkpoint.tree import StoredArray
from trainfleet.checkpoint.whole import Whole
from trainfleet.errors import CheckpointError, StoreError
from trainfleet.store import Buffer, Store, write_file

Float: TypeAlias = Literal["float32", "bfloat16", "float16"]

Watch: TypeAlias = Callable[[Iterator[Buffer]], Iterator[Buffer]]
"""Gives on the buffers it gets; sees how far they have come."""

INDEX = "model.safetensors.index.json"
SHARDS = "model-[0-9][0-9][0-9][0-9][0-9]-of-[0-9][0-9][0-9][0-9][0-9].safetensors"
"""What the files of an export in shards are called."""

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
    """The arrays of a state; CheckpointError if it has none, or two would be called alike outside."""
    found = list(whole.arrays(state))
    if not found:
        has = ", ".join(whole.states)
        raise CheckpointError(f"There is no state {state!r} with arrays to export; the checkpoint holds {has}.")
    named: dict[str, StoredArray] = {}
    for array in found:
        other = named.setdefault(exported_name(array), array)
        if other is not array:
            raise CheckpointError(f"{other.path} and {array.path} would both be called {exported_name(array)!r}.")
    return found


def export_file(
    whole: Whole, arrays: Sequence[StoredArray], file: Path, dtype: Float | None, watch: Watch = iter
) -> int:
    """Write these arrays as one file in one act; how many bytes that were. Damaged if what is stored is."""
    return write_file(file, watch(file_of(whole, arrays, dtype)))


def export_folder(
    whole: Whole, groups: Sequence[Sequence[StoredArray]], folder: Path, dtype: Float | None, watch: Watch = iter
) -> int:
    """Write each group as a file, and the index that loaders look for; how many bytes that were.

    All files are written beside their places first, so that damage found on the way harms no export that is there.
    Then the index goes, the files are renamed, and the index comes last: what is cut short is no export. Shards of
    an export before are removed, other files stay.
    """
    names = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    beside = folder / ".unfinished-export"
    try:
        shutil.rmtree(beside, ignore_errors=True)
        total = sum(export_file(whole, group, beside / name, dtype, watch) for name, group in zip(names, groups))
        (folder / INDEX).unlink(missing_ok=True)
        for name in names:
            (beside / name).replace(folder / name)
        total += write_file(folder / INDEX, index_of(names, groups, dtype))
        for file in folder.glob(SHARDS):
            if file.name not in names:
                file.unlink()
    except OSError as error:
        raise StoreError(f"{folder} cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return total


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
