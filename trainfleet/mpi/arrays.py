"""Arrays of any library: NumPy's as they are, those of CuPy and JAX by the array API, and through NumPy to other ranks.

Layers compute with the functions of the array's own library (`namespace`). What travels to other ranks is NumPy's: on
the CPU a view of the same memory by DLPack, from a GPU a copy. `GPU_PATH` says so in words.
"""

from __future__ import annotations

import logging
from typing import Any, Literal, TypeAlias

import numpy as np

from trainfleet.comm.group import Group

Array: TypeAlias = Any

GPU_PATH = "Arrays of a GPU travel through CPU memory: MPI gets copies, whether or not it could read the GPU's memory."
logger = logging.getLogger(__name__)
_said: set[str] = set()


def namespace(array: Array) -> Any:
    """The functions that work on this array: numpy, cupy, jax.numpy."""
    if hasattr(array, "__array_namespace__"):
        return array.__array_namespace__()
    return np  # before NumPy 2


def to_numpy(array: Array) -> Any:
    """The same numbers as a NumPy array: itself, a view of CPU memory, or a copy from a GPU."""
    if isinstance(array, np.ndarray):
        return array
    if hasattr(array, "get") and hasattr(array, "__cuda_array_interface__"):  # CuPy
        if GPU_PATH not in _said:
            _said.add(GPU_PATH)
            logger.info("%s", GPU_PATH)
        return array.get()
    try:
        return np.from_dlpack(array)
    except (AttributeError, BufferError, RuntimeError, TypeError):
        return np.asarray(array)


def like(array: Array, result: Any) -> Array:
    """NumPy's `result` in the library, and on the device, of `array`."""
    if isinstance(array, np.ndarray | np.generic):
        return result
    xp = namespace(array)
    device = getattr(array, "device", None)
    try:
        return xp.asarray(result, device=device)
    except TypeError:
        return xp.asarray(result)


def all_sum(array: Array, group: Group, op: Literal["sum", "max"] = "sum") -> Array:
    """The sum (or largest) over the group, in a new array of the same kind."""
    if group.size == 1:
        return array
    held = np.array(to_numpy(array))
    group.all_reduce_(held, op).wait()
    return like(array, held)
