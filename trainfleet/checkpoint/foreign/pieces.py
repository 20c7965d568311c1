"""An array that others saved: what it is, and where its pieces can be read when they are wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from trainfleet.checkpoint.arrays import DTYPES, Bytes, as_words, num_bytes
from trainfleet.checkpoint.regions import Region, first_overlap, tiles
from trainfleet.checkpoint.tree import Json
from trainfleet.errors import CheckpointError

_MOST_DIMENSIONS = 64
_MOST_ELEMENTS = 1 << 56


@dataclass(frozen=True, slots=True)
class ForeignPiece:
    region: Region
    read: Callable[[], Bytes]
    """Its elements, little-endian, in C order; CheckpointError if they cannot be had."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ForeignArray:
    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[ForeignPiece, ...]

    @property
    def num_bytes(self) -> int:
        return num_bytes(self.dtype, self.shape)

    def read(self) -> Bytes:
        """The whole array."""
        data = np.empty(self.num_bytes, np.uint8)
        whole = Region((0,) * len(self.shape), self.shape)
        for piece in self.pieces:
            cut = as_words(piece.read(), self.dtype, piece.region.shape)
            as_words(data, self.dtype, self.shape)[piece.region.slices_in(whole)] = cut
        return data


def whole_array(name: str, dtype: str, shape: tuple[int, ...], read: Callable[[], Bytes]) -> ForeignArray:
    """An array that lies in one piece."""
    piece = ForeignPiece(Region((0,) * len(shape), shape), read)
    return ForeignArray(name=name, dtype=dtype, shape=shape, pieces=(piece,) if 0 not in shape else ())


def check_shape(name: str, dtype: object, shape: object) -> tuple[int, ...]:
    """The shape as a tuple; CheckpointError where it, or the dtype, cannot be that of an array."""
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{name} is of dtype {dtype}, which cannot be stored; known are {', '.join(DTYPES)}.")
    if not isinstance(shape, list | tuple) or len(shape) > _MOST_DIMENSIONS:
        raise CheckpointError(f"{name} has no shape that an array can have.")
    elements = 1
    for length in shape:
        if type(length) is not int or length < 0:
            raise CheckpointError(f"{name} has the length {length!r} in its shape; a length is a whole number from 0.")
        elements *= max(length, 1)
        if elements > _MOST_ELEMENTS:
            raise CheckpointError(f"{name} would have more elements than any memory has.")
    return tuple(shape)


def check_pieces(array: ForeignArray) -> None:
    """CheckpointError unless the pieces lie within the array and make the whole of it, each element once."""
    for region in (piece.region for piece in array.pieces):
        inside = len(region.offsets) == len(region.shape) == len(array.shape) and all(
            at >= 0 and length > 0 and at + length <= most
            for at, length, most in zip(region.offsets, region.shape, array.shape)
        )
        if not inside:
            raise CheckpointError(
                f"A piece of {array.name} at {region.offsets} of shape {region.shape} does not lie within the whole, "
                f"{array.shape}."
            )
    regions = [piece.region for piece in array.pieces]
    if first_overlap(regions) is not None:
        raise CheckpointError(f"Two pieces of {array.name} hold the same elements.")
    if not tiles(regions, array.shape):
        raise CheckpointError(f"The pieces of {array.name} leave a hole: they do not make up {array.shape}.")


def state_tree(arrays: Iterable[ForeignArray], state: str) -> Json:
    """The arrays as one state of a checkpoint, in the form of checkpoint/tree.py."""
    nodes = [
        [a.name, {"$": "array", "dtype": a.dtype, "shape": list(a.shape), "library": "torch", "sharded": False}]
        for a in arrays
    ]
    return {state: {"$": "dict", "items": nodes}}  # not plain JSON, as a name may begin with $
