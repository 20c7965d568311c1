"""Samples into a batch: arrays are stacked, the nesting stays; and weights put into a batch."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainfleet.batch import map_arrays
from trainfleet.errors import DataError
from trainfleet.imports import imported


def stack_samples(samples: Sequence[Any], at: str = "") -> Any:
    """A batch of `samples` of one structure.

    Arrays of equal shape are stacked; integers become int64, floats float32, booleans bool; strings and
    bytes stay a list; torch tensors are stacked as such; dicts, tuples, lists and dataclasses are entered.
    """
    first = samples[0]
    where = f" at {at[1:]}" if at else ""
    if isinstance(first, np.ndarray | np.generic):
        return _stacked(samples, where)
    if _is_tensor(first):
        import torch

        if len({tuple(sample.shape) for sample in samples}) > 1:
            raise _unlike_shapes([sample.shape for sample in samples], where)
        return torch.stack([sample.detach().cpu() for sample in samples])
    if isinstance(first, bool):
        return np.array(samples, np.bool_)
    if isinstance(first, int | float):
        floating = any(isinstance(sample, float) for sample in samples)
        return np.array(samples, np.float32 if floating else np.int64)
    if isinstance(first, str | bytes):
        return list(samples)
    if isinstance(first, Mapping):
        _check_alike([frozenset(sample) for sample in samples], "keys", where)
        return {key: stack_samples([sample[key] for sample in samples], f"{at}.{key}") for key in first}
    if isinstance(first, tuple | list):
        _check_alike([len(sample) for sample in samples], "lengths", where)
        parts = [stack_samples(column, f"{at}.{place}") for place, column in enumerate(zip(*samples))]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        names = [field.name for field in dataclasses.fields(first)]
        values = {name: stack_samples([getattr(s, name) for s in samples], f"{at}.{name}") for name in names}
        return dataclasses.replace(first, **values)
    raise DataError(
        f"A sample holds a {type(first).__name__}{where}, which cannot be stacked into a batch. "
        "Turn it into an array in a transform, or give collate= a function from a list of samples to a batch."
    )


def _stacked(samples: Sequence[Any], where: str) -> NDArray[Any]:
    try:
        return np.stack(samples)
    except ValueError as exc:
        raise _unlike_shapes([np.shape(sample) for sample in samples], where) from exc


def _unlike_shapes(shapes: Sequence[Any], where: str) -> DataError:
    found = sorted({tuple(int(n) for n in shape) for shape in shapes})
    return DataError(
        f"Samples of shapes {', '.join(map(str, found[:4]))} cannot be stacked{where}. "
        "Bring them to one shape in a transform, or give collate= a function that pads."
    )


def _check_alike(values: Sequence[Any], what: str, where: str) -> None:
    for value in values:
        if value != values[0]:
            shown = [sorted(map(str, v)) if isinstance(v, frozenset) else v for v in (values[0], value)]
            raise DataError(f"Samples of one batch differ in their {what}{where}: {shown[0]} and {shown[1]}.")


def add_weights(batch: Any, weights: NDArray[np.float32]) -> Any:
    """The batch with a weight for each sample: 1, or 0 for one that only fills a slot.

    A dict gains the key "weight"; a tuple or list a last element; a dataclass or named tuple needs a field
    `weight`, which is set; anything else becomes (batch, weight). Weights already there are multiplied.
    """
    if isinstance(batch, Mapping):
        return {**batch, "weight": _times(batch.get("weight"), weights)}
    fields = getattr(batch, "_fields", None) or (
        [field.name for field in dataclasses.fields(batch)] if dataclasses.is_dataclass(batch) else None
    )
    if fields is not None:
        if "weight" not in fields:
            raise DataError(
                f"A batch of type {type(batch).__name__} has no field `weight` for samples that only fill a slot. "
                "Add one (1.0 in each sample), or use short='drop' and bad='raise'."
            )
        changed = {"weight": _times(batch.weight, weights)}
        return batch._replace(**changed) if hasattr(batch, "_replace") else dataclasses.replace(batch, **changed)
    if isinstance(batch, list | tuple):
        return type(batch)([*batch, weights])
    return (batch, weights)


def _times(present: Any, weights: NDArray[np.float32]) -> Any:
    if present is None:
        return weights
    if tuple(getattr(present, "shape", ())) != weights.shape:
        raise DataError(
            f"The samples' own `weight` has shape {tuple(getattr(present, 'shape', ()))} in a batch of "
            f"{len(weights)}; it must be one number a sample, or bear another name."
        )
    return np.asarray(present, np.float32) * weights


def to_torch(batch: Any, *, pin: bool = False) -> Any:
    """The batch with tensors for NumPy arrays, sharing their memory; pinned where there is a CUDA device."""
    import torch

    pin = pin and torch.cuda.is_available()

    def convert(array: Any) -> Any:
        if isinstance(array, np.ndarray | np.generic):
            array = _tensor(np.asarray(array))
        return array.pin_memory() if pin and isinstance(array, torch.Tensor) else array

    return map_arrays(convert, batch)


def _tensor(array: NDArray[Any]) -> Any:
    import torch

    if array.dtype.kind in "USO":
        return array
    if not array.flags.writeable or not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return torch.from_numpy(array)


def to_numpy(batch: Any) -> Any:
    """The batch with NumPy arrays for torch tensors."""
    return map_arrays(lambda array: array.numpy() if _is_tensor(array) else array, batch)


def torch_installed() -> bool:
    return "torch" in sys.modules or find_spec("torch") is not None


def _is_tensor(value: Any) -> bool:
    torch = imported("torch")
    return torch is not None and isinstance(value, torch.Tensor)
