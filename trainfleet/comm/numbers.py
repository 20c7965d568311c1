"""What groups agree on about numbers: which can be reduced, in which width they are added up, how they are named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from trainfleet.comm.group import Array
from trainfleet.state import is_tensor

REDUCTIONS: dict[str, Callable[[Any], Any]] = {
    "sum": lambda stack: stack.sum(axis=0),
    "mean": lambda stack: stack.mean(axis=0),
    "max": lambda stack: stack.max(axis=0),
    "min": lambda stack: stack.min(axis=0),
}

_PAIRS: dict[str, Any] = {"sum": np.add, "mean": np.add, "max": np.maximum, "min": np.minimum}


def is_small_float(dtype: Any) -> bool:
    """Whether this is float16, or the bfloat16 of ml_dtypes, which NumPy knows by name only."""
    return dtype == np.float16 or str(dtype) == "bfloat16"


def reduce_parts(parts: list[Any], op: str) -> Any:
    """Sums of 16-bit floats overflow and lose digits: they are added up in float32 and rounded once."""
    dtype = parts[0].dtype
    stack = np.stack(parts)
    return REDUCTIONS[op](stack.astype(np.float32) if is_small_float(dtype) else stack).astype(dtype)


def add_up_(rows: Any, op: str) -> Any:
    """The sum (mean, largest, smallest) of the rows of an array, in the first of them or rounded from float32."""
    if is_small_float(rows.dtype):
        return reduce_parts(list(rows), op)
    first = rows[0]
    for row in rows[1:]:
        _PAIRS[op](first, row, out=first)
    return np.divide(first, len(rows), out=first) if op == "mean" else first


def check_reduction(array: Array, op: str) -> None:
    if op not in REDUCTIONS:
        raise ValueError(f"The reduction is {op!r}; use one of {', '.join(REDUCTIONS)}.")
    if op == "mean" and not (np.issubdtype(array.dtype, np.inexact) or is_small_float(array.dtype)):
        raise TypeError(f"The mean of {array.dtype} is no {array.dtype}; reduce by 'sum', or convert first.")


def signature(array: Array) -> str:
    return f"{array.dtype} {tuple(array.shape)}"


def as_numpy(array: Array) -> Any:
    """The array itself, or a view of a tensor's memory. TypeError for what is not in CPU memory."""
    if not is_tensor(array):
        if not isinstance(array, np.ndarray):
            raise TypeError(f"A group takes NumPy arrays and torch tensors; this is a {type(array).__name__}.")
        return array
    if array.device.type != "cpu":
        raise TypeError(f"This tensor is on {array.device}; MPI takes tensors in CPU memory. Use tensor.cpu().")
    if "bfloat16" in str(array.dtype):
        import ml_dtypes
        import torch

        return array.detach().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return array.detach().numpy()


def like(array: Array, result: Any) -> Array:
    """A NumPy result as the kind of array that was given."""
    if not is_tensor(array):
        return result
    import torch

    if str(result.dtype) == "bfloat16":
        return torch.from_numpy(result.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(result)
