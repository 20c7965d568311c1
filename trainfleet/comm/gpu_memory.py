"""Arrays of any library: its functions, whether they lie in a GPU's memory, and whether MPI reads them there."""

from __future__ import annotations

import os
import sys
from typing import Any

from trainfleet.comm.group import Array
from trainfleet.state import is_tensor

_GPUS = {"cuda", "rocm", "level_zero"}
# Libraries that do not report their kinds of memory are switched on by these.
_SWITCHES = {"MPICH_GPU_SUPPORT_ENABLED": "1", "MV2_USE_CUDA": "1", "OMPI_MCA_opal_cuda_support": "true"}


def namespace(array: Array) -> Any:
    """The functions that work on this array: numpy, cupy, jax.numpy."""
    if hasattr(array, "__array_namespace__"):
        return array.__array_namespace__()
    return sys.modules[type(array).__module__.partition(".")[0]]  # NumPy before 2, CuPy before 14


def is_on_gpu(array: Array) -> bool:
    """Whether this is an array of a GPU that can be written in place, as those of CuPy; JAX's cannot."""
    return not is_tensor(array) and hasattr(array, "get") and hasattr(array, "__cuda_array_interface__")


def reads_gpu_memory(kinds: tuple[str, ...]) -> bool:
    """Whether an MPI that reports these kinds of memory can be handed that of a GPU (MPI 4.1, section 11.4.3)."""
    return bool(_GPUS & set(kinds)) or any(os.environ.get(name) == value for name, value in _SWITCHES.items())


def synchronize(array: Array) -> None:
    """Wait until the GPU has computed what was asked of it so far: MPI would read too early."""
    namespace(array).cuda.get_current_stream().synchronize()


def empty(like: Array, shape: tuple[int, ...]) -> Any:
    """A new array beside `like`: of the same library, dtype and device."""
    return namespace(like).empty(shape, dtype=like.dtype)
