"""Any nesting of dicts, lists, tuples and dataclasses around arrays as a JSON tree and a list of byte arrays.

Scalars, strings and dicts with string keys stand for themselves; everything else is a list that begins with
a tag: `l` list, `t` tuple, `d` dict with other keys, `N` named tuple, `D` dataclass, `b` bytes, `a` array, `n` NumPy
scalar, `T` torch tensor. The bytes of arrays follow each other in the order of the tree, each aligned to 64, so
that a receiver computes every length and place by itself and believes none.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Mapping
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from trainfleet.errors import DataError, PeerError
from trainfleet.imports import imported

ALIGN: Final = 64
MAX_DIMS: Final = 32

Bytes: TypeAlias = NDArray[np.uint8]
Classes: TypeAlias = Mapping[str, type]
"""The dataclasses and named tuples that may be built here, by `name_of`."""

_NUMPY_DTYPE = re.compile(
    r"\|b1|[<>|][iu][1248]|[<>]f[248]|[<>]c(8|16)|[<>]U[1-9]\d{0,5}|\|S[1-9]\d{0,5}|[<>][mM]8(\[\d{0,9}[a-zA-Z]{1,2}\])?"
)
_TORCH_BYTES = {"bool": 1, "uint8": 1, "int8": 1, "int16": 2, "int32": 4, "int64": 8, "uint16": 2, "uint32": 4}
_TORCH_BYTES |= {"uint64": 8, "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "complex64": 8, "complex128": 16}
_TORCH_BYTES |= dict.fromkeys(
    ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"), 1
)
_KEYS = (str, int, float, bool, type(None))


def name_of(cls: type) -> str:
    """The name under which a dataclass or named tuple travels: `module:qualified name`."""
    return f"{cls.__module__}:{cls.__qualname__}"


def allow(*classes: type) -> dict[str, type]:
    """What a receiver may build: pass it as `classes`. DataError for what is neither dataclass nor named tuple."""
    for cls in classes:
        if not (dataclasses.is_dataclass(cls) or (issubclass(cls, tuple) and hasattr(cls, "_fields"))):
            raise DataError(
                f"{cls.__name__} is neither a dataclass nor a named tuple, so no body of a frame can hold it."
            )
    return {name_of(cls): cls for cls in classes}


def padded(num_bytes: int) -> int:
    return -(-num_bytes // ALIGN) * ALIGN


# out


class Flattened(NamedTuple):
    """A nesting on its way out."""

    tree: Any
    """JSON."""
    arrays: list[Bytes]
    """Views of the arrays' own memory, one-dimensional; copies only where an array was not contiguous."""


def flatten(value: Any, *, max_depth: int) -> Flattened:
    """`value` taken apart; DataError names the place of what cannot travel."""
    writer = _Writer(max_depth)
    return Flattened(writer.node(value), writer.arrays)


def as_bytes(array: NDArray[Any]) -> Bytes:
    """Its own memory, one-dimensional; a copy where it was not contiguous."""
    return np.asarray(array, order="C").reshape(-1).view(np.uint8)


class _Writer:
    def __init__(self, max_depth: int) -> None:
        self.arrays: list[Bytes] = []
        self._max_depth = max_depth
        self._path: list[Any] = []

    def node(self, value: Any) -> Any:
        kind = type(value)
        if value is None or kind in (bool, int, float, str):
            return value
        if kind is np.ndarray or kind is np.memmap:
            return self._put(value, "a", list(value.shape))
        if isinstance(value, np.generic):
            return self._put(np.asarray(value), "n")
        if kind is bytes:
            self.arrays.append(np.frombuffer(value, np.uint8) if value else np.empty(0, np.uint8))
            return ["b", len(value)]
        if len(self._path) >= self._max_depth:
            raise DataError(f"A body is nested deeper than {self._max_depth}{self._where()}. Make it flatter.")
        if kind is dict or isinstance(value, Mapping):
            return self._mapping(value)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return ["N", name_of(kind), *self._items(value)]
        if isinstance(value, list | tuple):
            return ["l" if isinstance(value, list) else "t", *self._items(value)]
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            names = [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
            return ["D", name_of(kind), {name: self._below(name, getattr(value, name)) for name in names}]
        torch = imported("torch")
        if torch is not None and kind in (torch.Tensor, torch.nn.Parameter):
            return self._tensor(torch, value)
        raise self._refusal(value)

    def _below(self, key: Any, value: Any) -> Any:
        self._path.append(key)
        node = self.node(value)
        self._path.pop()
        return node

    def _items(self, values: list[Any] | tuple[Any, ...]) -> list[Any]:
        return [self._below(place, value) for place, value in enumerate(values)]

    def _mapping(self, value: Mapping[Any, Any]) -> Any:
        if all(type(key) is str for key in value):
            return {key: self._below(key, item) for key, item in value.items()}
        for key in value:
            if type(key) not in _KEYS:
                raise DataError(f"A dict has the key {key!r}{self._where()}; keys that travel are strings and numbers.")
        return ["d", *([key, self._below(key, item)] for key, item in value.items())]

    def _put(self, array: Any, *tag_and_shape: Any) -> list[Any]:
        dtype: str = array.dtype.str
        if not _NUMPY_DTYPE.fullmatch(dtype):
            raise DataError(
                f"An array of dtype {array.dtype}{self._where()} cannot travel. "
                "Use booleans, integers, floats up to 64 bits, complex numbers, strings or dates."
            )
        self.arrays.append(as_bytes(array))
        tag, *shape = tag_and_shape
        return [tag, dtype, *shape]

    def _tensor(self, torch: Any, tensor: Any) -> Any:
        dtype = str(tensor.dtype).removeprefix("torch.")
        if tensor.layout is not torch.strided or dtype not in _TORCH_BYTES:
            raise self._refusal(tensor)
        if tensor.device.type != "cpu":
            raise DataError(f"A tensor lies on {tensor.device}{self._where()}. Move it to the CPU before it is sent.")
        flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
        self.arrays.append(flat.view(torch.uint8).numpy() if flat.numel() else np.empty(0, np.uint8))
        return ["T", dtype, list(tensor.shape)]

    def _where(self) -> str:
        return f" at {'.'.join(map(str, self._path))}" if self._path else ""

    def _refusal(self, value: Any) -> DataError:
        kind = type(value)
        named = f"{kind.__name__} of {value.dtype}, {value.layout}" if hasattr(value, "layout") else kind.__name__
        return DataError(
            f"A {named}{self._where()} cannot travel. "
            "Arrays, strings, bytes, numbers and dicts, lists, tuples and dataclasses of them can."
        )


# in


class NotAllowed(DataError):
    """A well-formed body holds a class that the receiver's list does not have."""


def survey(tree: Any, *, classes: Classes, max_depth: int, max_arrays: int, max_bytes: int) -> int:
    """Check a tree from a peer, and give the bytes that its arrays take.

    Raises PeerError for what no sender of ours would write, NotAllowed for a class that `classes` does not have.
    """
    reader = _Reader(None, classes, max_depth=max_depth, max_arrays=max_arrays, max_bytes=max_bytes)
    try:
        reader.node(tree, 0)
    except (
        TypeError,
        ValueError,
        IndexError,
        AttributeError,
        OverflowError,
    ) as exc:  # parts missing, or of another kind
        raise PeerError(f"A frame has a body that cannot be: {exc}.") from exc
    if reader.refused is not None:
        raise NotAllowed(
            f"A frame holds a {reader.refused}, which is not among the classes that may be built here. "
            "Pass classes=allow(...) with it, or let the sender make a dict of it."
        )
    return padded(reader.used)


def build(tree: Any, memory: Bytes, *, classes: Classes, shared: bool = False) -> Any:
    """The body whose arrays lie in `memory`, as views; `tree` has passed `survey`, which says how much that is.

    `shared`: the sender can still write there, so what has to stay as it was checked is copied.
    """
    reader = _Reader(memory, classes, shared=shared)
    try:
        return reader.node(tree, 0)
    except (TypeError, ValueError, RuntimeError, OverflowError) as exc:
        raise PeerError(f"A frame has a body that cannot be built: {exc}.") from exc


class _Reader:
    """Walks a tree; without memory it only checks and counts."""

    def __init__(
        self,
        memory: Bytes | None,
        classes: Classes,
        *,
        max_depth: int = sys.maxsize,
        max_arrays: int = sys.maxsize,
        max_bytes: int = sys.maxsize,
        shared: bool = False,
    ) -> None:
        self.used = 0
        self.refused: str | None = None
        self._memory, self._classes, self._shared = memory, classes, shared
        self._max_depth, self._max_arrays, self._max_bytes = max_depth, max_arrays, max_bytes
        self._arrays = 0

    def node(self, node: Any, depth: int) -> Any:
        kind = type(node)
        if kind is dict:
            self._check_depth(depth)
            return {key: self.node(value, depth + 1) for key, value in node.items()}
        if kind is not list:
            return node
        tag = node[0] if node else None
        if tag == "a":
            _, dtype, shape = node
            return self._array(dtype, shape)
        if tag == "n":
            _, dtype = node
            array = self._array(dtype, [])
            return array if array is None else array[()]
        if tag == "b":
            _, length = node
            data = self._take(_natural(length))
            return None if data is None else data.tobytes()
        if tag == "T":
            _, dtype, shape = node
            return self._tensor(dtype, shape)
        self._check_depth(depth)
        if tag == "l":
            return [self.node(value, depth + 1) for value in node[1:]]
        if tag == "t":
            return tuple([self.node(value, depth + 1) for value in node[1:]])
        if tag == "d":
            return self._dict(node[1:], depth)
        if tag == "N":
            return self._named_tuple(node[1], [self.node(value, depth + 1) for value in node[2:]])
        if tag == "D":
            _, name, fields = node
            return self._dataclass(name, {key: self.node(value, depth + 1) for key, value in fields.items()})
        raise PeerError(f"A frame has a body with the unknown tag {str(tag)[:20]!r}.")

    def _check_depth(self, depth: int) -> None:
        if depth >= self._max_depth:
            raise PeerError(f"A frame has a body nested deeper than {self._max_depth}.")

    def _dict(self, pairs: list[Any], depth: int) -> dict[Any, Any]:
        made = {}
        for key, value in pairs:
            if type(key) not in _KEYS:
                raise PeerError("A frame has a dict with a key that is no scalar.")
            made[key] = self.node(value, depth + 1)
        return made

    def _take(self, num_bytes: int) -> Bytes | None:
        begin = padded(self.used)
        self.used = begin + num_bytes
        if self._memory is None:
            self._arrays += 1
            if self._arrays > self._max_arrays:
                raise PeerError(f"A frame has more than {self._max_arrays:,} arrays.")
            if self.used > self._max_bytes:
                raise PeerError(f"A frame has arrays of more than {self._max_bytes:,} bytes.")
            return None
        return self._memory[begin : self.used]

    def _array(self, text: Any, shape: Any) -> Any:
        if type(text) is not str or not _NUMPY_DTYPE.fullmatch(text):
            raise PeerError(f"A frame has an array of dtype {str(text)[:20]!r}.")
        dtype = np.dtype(text)
        count = _count(shape)
        flat = self._take(count * dtype.itemsize)
        if flat is None:
            return None
        if count == 0:
            return np.empty(shape, dtype)
        if dtype.kind == "b":
            flat = self._booleans(flat)
        return flat.view(dtype).reshape(shape)

    def _tensor(self, name: Any, shape: Any) -> Any:
        if type(name) is not str or name not in _TORCH_BYTES:
            raise PeerError(f"A frame has a tensor of dtype {str(name)[:20]!r}.")
        count = _count(shape)
        flat = self._take(count * _TORCH_BYTES[name])
        torch = imported("torch")
        if torch is None or not hasattr(torch, name):
            lacking = "torch, which is not imported" if torch is None else f"torch's {name}, which is unknown"
            self.refused = f"tensor of {lacking}"
            return None
        if flat is None:
            return None
        if count == 0:
            return torch.empty(shape, dtype=getattr(torch, name))
        if name == "bool":
            flat = self._booleans(flat)
        return torch.from_numpy(flat).view(getattr(torch, name)).reshape(shape)

    def _booleans(self, flat: Bytes) -> Bytes:
        """Libraries count true elements by adding them up: a 2 among them makes them read past the end."""
        flat = flat.copy() if self._shared else flat
        if flat.max() > 1:
            raise PeerError("A frame has booleans that are neither 0 nor 1.")
        return flat

    def _class(self, name: Any) -> Any:
        cls = self._classes.get(name) if type(name) is str else None
        if cls is None:
            self.refused = str(name)[:200]
        return cls

    def _named_tuple(self, name: Any, values: list[Any]) -> Any:
        cls = self._class(name)
        if cls is None:
            return None
        if not hasattr(cls, "_fields") or len(cls._fields) != len(values):
            raise PeerError(f"A frame has a {name} of {len(values)} elements, which is not what it has here.")
        return None if self._memory is None else tuple.__new__(cls, values)

    def _dataclass(self, name: Any, values: dict[str, Any]) -> Any:
        """Made as `copy` makes one, without the constructor: `__post_init__` has run where it was first built."""
        cls = self._class(name)
        if cls is None:
            return None
        known = {field.name for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()
        if not values.keys() <= known:
            raise PeerError(f"A frame has a {name} with fields that it does not have here.")
        if self._memory is None:
            return None
        made = object.__new__(cls)
        for key, value in values.items():
            object.__setattr__(made, key, value)
        return made


def _natural(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise PeerError(f"A frame has a length of {str(value)[:20]}.")
    return value


def _count(shape: Any) -> int:
    if type(shape) is not list or len(shape) > MAX_DIMS:
        raise PeerError(f"A frame has an array of shape {str(shape)[:40]}.")
    return math.prod(map(_natural, shape))
