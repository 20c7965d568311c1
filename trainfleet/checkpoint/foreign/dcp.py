"""Tensors in the distributed checkpoints of PyTorch (DCP): a folder of files and `.metadata`, which is a pickle."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from trainfleet.checkpoint.arrays import DTYPES, Bytes, num_bytes
from trainfleet.checkpoint.foreign import dcp_metadata
from trainfleet.checkpoint.foreign.pieces import ForeignArray, ForeignPiece, check_pieces, check_shape
from trainfleet.checkpoint.foreign.torch_file import INNER, bytes_of, is_dense, load_tensors
from trainfleet.checkpoint.regions import Region
from trainfleet.errors import CheckpointError

METADATA = ".metadata"
_MOST_METADATA_BYTES = 1 << 30
_DEADLINE = timedelta(minutes=2)


def arrays_in_dcp(folder: Path) -> tuple[list[ForeignArray], str | None]:
    """The tensors of a distributed checkpoint by name, joined from their pieces when they are read.

    Where the weights were saved under a key such as `model`, those alone; that key is told.
    """
    tensors = _described(folder / METADATA)["tensors"]
    if not tensors:
        raise CheckpointError(f"The distributed checkpoint in {folder} holds no tensors.")
    within = next((key for key in INNER if any(t["keys"][:1] == [key] for t in tensors)), None)
    if any(len(tensor["keys"]) < 2 for tensor in tensors):
        within = None
    kept = [tensor for tensor in tensors if within in (None, tensor["keys"][0])]
    return [_array(folder, tensor, skip=0 if within is None else 1) for tensor in kept], within


def _described(file: Path) -> dict[str, Any]:
    """What the metadata says; see dcp_metadata.py for why another process reads it."""
    try:
        size = file.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}.") from error
    if size > _MOST_METADATA_BYTES:
        raise CheckpointError(f"{file} has {size} bytes; no checkpoint describes itself at such length.")
    command = [sys.executable, "-I", str(dcp_metadata.__file__), str(file.absolute())]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_DEADLINE.total_seconds(), check=False
        )
        answer: dict[str, Any] = json.loads(done.stdout)
    except subprocess.TimeoutExpired as error:
        raise CheckpointError(f"{file} could not be read within {_DEADLINE.total_seconds():.0f} s.") from error
    except ValueError as error:  # killed at a limit, it leaves no answer
        raise CheckpointError(
            f"{file} is not the metadata of a distributed checkpoint: reading it took more time or memory than any "
            "such file needs."
        ) from error
    if "error" in answer:
        raise CheckpointError(f"{file} is not the metadata of a distributed checkpoint: {answer['error']}.")
    return answer


def _array(folder: Path, tensor: dict[str, Any], *, skip: int) -> ForeignArray:
    name, dtype = ".".join(tensor["keys"][skip:]), tensor["dtype"]
    shape = check_shape(name, dtype, tensor["shape"])
    pieces = []
    for chunk in tensor["chunks"]:
        region = Region(tuple(chunk["offsets"]), check_shape(name, dtype, chunk["shape"]))
        if region.volume:
            _check_place(folder, name, chunk, num_bytes(dtype, region.shape))
            read = partial(_read, folder / chunk["file"], name, dtype, region.shape, chunk["begin"], chunk["bytes"])
            pieces.append(ForeignPiece(region, read))
    array = ForeignArray(name=name, dtype=dtype, shape=shape, pieces=tuple(pieces))
    check_pieces(array)
    return array


def _check_place(folder: Path, name: str, chunk: dict[str, Any], size: int) -> None:
    file = chunk["file"]
    if Path(file).name != file or file in ("", ".", "..") or "\0" in file:
        raise CheckpointError(f"The metadata in {folder} names the file {file!r}, which is not beside it.")
    try:
        there = (folder / file).stat().st_size
    except OSError as error:
        raise CheckpointError(f"{folder / file} cannot be read: {error.strerror or error}.") from error
    if chunk["begin"] < 0 or chunk["begin"] + chunk["bytes"] > there or chunk["bytes"] < size:
        raise CheckpointError(
            f"{folder / file} has {there} bytes, and {name} would need {max(size, chunk['bytes'])} of them from byte "
            f"{chunk['begin']} on; it is cut short, or of another checkpoint."
        )


def _read(file: Path, name: str, dtype: str, shape: tuple[int, ...], begin: int, size: int) -> Bytes:
    assert dtype in DTYPES
    try:
        with file.open("rb") as opened:
            opened.seek(begin)
            data = opened.read(size)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}.") from error
    tensor = load_tensors(io.BytesIO(data), f"{name} in {file}")
    found = (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) if is_dense(tensor) else None
    if found != (dtype, shape):
        raise CheckpointError(f"{name} in {file} is {found or 'no tensor'}; the metadata says {(dtype, shape)}.")
    return bytes_of(tensor, dtype)
