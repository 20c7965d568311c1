"""Bytes of a column or a file, decoded: by the encodings of MDS, by the endings of WebDataset; never by pickle."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from trainfleet.data.images import SUFFIXES, decode_image
from trainfleet.data.shards.cache import Damaged
from trainfleet.errors import DataError

Decoder: TypeAlias = Callable[[memoryview], Any]

SCALARS = ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16", "float32", "float64")
DTYPE_CODES = {
    8: "uint8",
    9: "int8",
    16: "uint16",
    17: "int16",
    18: "float16",
    32: "uint32",
    33: "int32",
    34: "float32",
    64: "uint64",
    65: "int64",
    66: "float64",
}
"""How an MDS array names its dtype where the encoding does not."""
MAX_DIGITS = 4000
PIL_MODES = {"1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "LA", "I;16"}


def checked_mode(mode: str | None) -> str | None:
    """What images are converted to; DataError for what is none of RGB, L, RGBA and None."""
    if mode not in (None, "RGB", "L", "RGBA"):
        raise DataError(f"mode is {mode!r}; use RGB, L or RGBA, or none at all to have images as they are.")
    return mode


def decoder_of(encoding: str, column: str, mode: str | None) -> Decoder:
    """What decodes a column of MDS with this encoding; DataError for one that is not read."""
    name, _, details = encoding.partition(":")
    plain: dict[str, Decoder] = {
        "bytes": bytes,
        "str": _text,
        "int": partial(_scalar, dtype="int64"),
        "json": _json,
        "str_int": partial(_number, kind=int),
        "str_float": partial(_number, kind=float),
        "str_decimal": partial(_number, kind=Decimal),
        "jpeg": partial(_image, mode=mode),
        "png": partial(_image, mode=mode),
        "pil": partial(_raw_image, mode=mode),
    }
    if name in SCALARS:
        return partial(_scalar, dtype=name)
    if name == "ndarray":
        return _array_decoder(details, column)
    if name in plain:
        return plain[name]
    if name == "pkl":
        raise DataError(
            f"The column {column!r} is pickled, and nothing is unpickled here: it could run any code. "
            "Write it as ndarray, json or bytes, or leave it out by columns=."
        )
    raise DataError(f"The column {column!r} has the encoding {encoding[:40]!r}, which is not known; leave it out.")


def decode_file(extension: str, data: memoryview, mode: str | None) -> Any:
    """What a file of a WebDataset sample holds, by its ending; bytes where the ending says nothing."""
    ending = extension.rsplit(".", 1)[-1]
    if f".{ending}" in SUFFIXES:
        return _image(data, mode=mode)
    if ending in ("cls", "cls2", "class", "count", "index", "inx", "id"):
        return np.int64(_number(data, kind=int))
    if ending in ("txt", "text", "transcript"):
        return _text(data)
    if ending in ("json", "jsn"):
        return _json(data)
    if ending in ("npy", "npz"):
        return _numpy(data)
    return bytes(data)


def _scalar(data: memoryview, *, dtype: str) -> Any:
    wanted = np.dtype(dtype).newbyteorder("<")
    if len(data) != wanted.itemsize:
        raise Damaged(f"a {dtype} has {len(data)} bytes.")
    return np.frombuffer(data, wanted)[0].astype(dtype)


def _text(data: memoryview) -> str:
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError as exc:
        raise DataError(f"a text is no UTF-8: {exc}") from exc


def _json(data: memoryview) -> Any:
    try:
        return json.loads(bytes(data))
    except (ValueError, RecursionError) as exc:
        raise DataError(f"it is no JSON: {exc}") from exc


def _number(data: memoryview, *, kind: Callable[[str], Any]) -> Any:
    try:
        if len(data) > MAX_DIGITS:
            raise ValueError(f"{len(data)} digits")
        return kind(_text(data))
    except (ValueError, InvalidOperation) as exc:
        raise DataError(f"it is no number: {bytes(data[:40])!r}") from exc


def _array_decoder(details: str, column: str) -> Decoder:
    dtype, _, shape = details.partition(":")
    try:
        dims = tuple(int(dim) for dim in shape.split(",")) if shape else None
        if (dtype and dtype not in SCALARS) or (dims is not None and (min(dims) < 1 or len(dims) > 32)):
            raise ValueError
    except ValueError:
        raise DataError(f"The column {column!r} has the encoding 'ndarray:{details[:60]}', which is none.") from None
    return partial(_array, dtype=dtype or None, shape=dims)


def _array(data: memoryview, *, dtype: str | None, shape: tuple[int, ...] | None) -> NDArray[Any]:
    try:
        if dtype is None:
            dtype, data = DTYPE_CODES[data[0]], data[1:]
        if shape is None:
            # [dimensions << 2 | log2 of the bytes of each], then the dimensions
            num_dims, width = data[0] >> 2, 1 << (data[0] & 3)
            shape = tuple(int.from_bytes(data[1 + i * width : 1 + (i + 1) * width], "little") for i in range(num_dims))
            data = data[1 + num_dims * width :]
    except (KeyError, IndexError) as exc:
        raise Damaged(f"the head of an array is garbled: {exc}.") from exc
    wanted = np.dtype(dtype).newbyteorder("<")
    if math.prod(shape) * wanted.itemsize != len(data) or len(shape) > 32:
        raise Damaged(f"an array of {dtype}{list(shape)} has {len(data)} bytes.")
    try:
        return np.frombuffer(data, wanted).reshape(shape).astype(dtype)
    except ValueError as exc:  # of no element, and of dimensions beyond all memory
        raise Damaged(f"an array of {dtype}{list(shape)} cannot be: {exc}.") from exc


def _numpy(data: memoryview) -> Any:
    try:
        found = np.load(io.BytesIO(data), allow_pickle=False)
        if isinstance(found, np.ndarray):
            return found
        with found:
            return {name: found[name] for name in found.files}
    except Exception as exc:  # zipfile, zlib and NumPy each have their own
        raise DataError(f"it is no NumPy file that can be read without pickle: {exc}") from exc


def _image(data: memoryview, *, mode: str | None) -> NDArray[np.uint8]:
    return decode_image(io.BytesIO(data), mode)


def _raw_image(data: memoryview, *, mode: str | None) -> NDArray[np.uint8]:
    """uint32 width, height and length of the mode, the mode, and the pixels as PIL lays them."""
    from PIL import Image

    if len(data) < 12:
        raise Damaged(f"an image has {len(data)} bytes.")
    width, height, length = (int.from_bytes(data[i : i + 4], "little") for i in (0, 4, 8))
    kind = bytes(data[12 : 12 + length][:20]).decode("latin-1")
    if kind not in PIL_MODES or width * height > len(data) * 8:
        raise Damaged(f"an image says that it is {width} x {height} of mode {kind!r}.")
    try:
        return decode_image(Image.frombytes(kind, (width, height), bytes(data[12 + length :])), mode)
    except ValueError as exc:
        raise Damaged(f"an image of {width} x {height} and mode {kind}: {exc}.") from exc
