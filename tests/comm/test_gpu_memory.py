"""Which arrays lie on a GPU, and whether MPI says that it reads there; `mpi/test_arrays` trains by it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from trainfleet.comm.gpu_memory import empty, is_on_gpu, namespace, reads_gpu_memory


def test_arrays_of_the_cpu_are_not_on_a_gpu():
    assert not is_on_gpu(np.ones(2)) and namespace(np.ones(2)) is np
    assert is_on_gpu(SimpleNamespace(get=None, __cuda_array_interface__={}))
    made = empty(np.ones(2, np.float32), (3, 1))
    assert (made.shape, made.dtype) == ((3, 1), np.float32)


def test_arrays_of_older_libraries_have_the_functions_of_their_module():
    class Old:
        __module__ = "numpy.core"

    assert namespace(Old()) is np


def test_tensors_are_left_to_torch():
    torch = pytest.importorskip("torch", reason="tensors are torch's")
    assert not is_on_gpu(torch.ones(2))


@pytest.mark.parametrize(
    ("kinds", "switches", "reads"),
    [
        (("mpi", "system"), {}, False),
        (("mpi", "system", "cuda"), {}, True),
        (("mpi", "rocm"), {}, True),
        ((), {"MPICH_GPU_SUPPORT_ENABLED": "1"}, True),
        ((), {"MPICH_GPU_SUPPORT_ENABLED": "0"}, False),
        ((), {"OMPI_MCA_opal_cuda_support": "true"}, True),
    ],
)
def test_mpi_reads_gpus_where_it_says_so_or_was_switched_on(monkeypatch, kinds, switches, reads):
    for name in ("MPICH_GPU_SUPPORT_ENABLED", "MV2_USE_CUDA", "OMPI_MCA_opal_cuda_support"):
        monkeypatch.delenv(name, raising=False)
    for name, value in switches.items():
        monkeypatch.setenv(name, value)
    assert reads_gpu_memory(kinds) is reads
