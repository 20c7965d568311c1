"""Arrays of any library: NumPy's as they are, those of CuPy and JAX by the array API, and through NumPy to other ranks.

Layers compute with the functions of the array's own library (`namespace`). What travels to other ranks is NumPy's: on
the CPU a view of the same memory by DLPack, from a GPU a copy; or CuPy's array as it is, where MPI reads the memory of
GPUs. The log says once which of the two it is.
"""

from __future__ import annotations

import logging
from typing import Any, Literal, TypeAlias

import numpy as np

from trainfleet.comm.gpu_memory import is_on_gpu, namespace
from trainfleet.comm.group import Group

__all__ = ["BY_COPY", "DIRECT", "Array", "all_sum", "for_group", "like", "namespace", "to_numpy"]

Array: TypeAlias = Any

BY_COPY = "Arrays of a GPU travel through CPU memory: this MPI, or this group, cannot read the GPU's."
DIRECT = "Arrays of a GPU travel as they are: this MPI reads the GPU's memory."
logger = logging.getLogger(__name__)
_said: set[str] = set()


def for_group(array: Array, group: Group) -> Any:
    """What travels in place of `array`: itself on a GPU whose memory the group reads, else NumPy's."""
    if type(array) is np.ndarray:
        return array
    if is_on_gpu(array) and (takes := getattr(group, "takes", None)) is not None and takes(array):
        _say(DIRECT)
        return array
    return to_numpy(array)


def to_numpy(array: Array) -> Any:
    """The same numbers as a NumPy array: itself, a view of CPU memory, or a copy from a GPU."""
    if is_on_gpu(array):
        _say(BY_COPY)
        return array.get()
    if isinstance(array, np.ndarray):
        return array
    try:
        return np.from_dlpack(array)
    except (AttributeError, BufferError, RuntimeError, TypeError):
        return np.asarray(array)


def like(array: Array, result: Any) -> Array:
    """NumPy's `result` in the library, and on the device, of `array`."""
    if type(array) is type(result) or isinstance(array, np.generic):
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
    held = for_group(array, group)
    held = held.copy() if held is array or not held.flags.owndata else held
    group.all_reduce_(held, op).wait()
    return like(array, held)


def _say(sentence: str) -> None:
    if sentence not in _said:
        _said.add(sentence)
        logger.info("%s", sentence)
