"""Arrays of other libraries: in by DLPack, out in the library and on the device they came from."""

from __future__ import annotations

import numpy as np
import pytest

from trainfleet.mpi.arrays import all_sum, like, namespace, to_numpy
from trainfleet.mpi.layers import mlp


def test_numpy_passes_as_it_is():
    array = np.ones(3)
    assert namespace(array) is np and to_numpy(array) is array and like(array, array) is array


def test_tensors_become_views_by_dlpack():
    torch = pytest.importorskip("torch", reason="the other library here is torch")
    tensor = torch.ones(3)
    to_numpy(tensor)[0] = 5
    assert tensor[0] == 5


class OnDevice:
    """What CuPy's arrays offer, without a GPU."""

    __cuda_array_interface__ = None

    def get(self):
        return np.arange(3.0)


def test_arrays_of_a_gpu_come_as_copies_and_that_is_said(caplog):
    import trainfleet.mpi.arrays as arrays

    arrays._said.clear()
    with caplog.at_level("INFO"):
        assert to_numpy(OnDevice()).tolist() == [0, 1, 2]
        to_numpy(OnDevice())
    assert [record.message for record in caplog.records] == [arrays.GPU_PATH]


def summed(group):
    array = np.full(3, float(group.rank))
    return all_sum(array, group).tolist(), array.tolist(), all_sum(array, group, "max").tolist()


def test_sums_are_new_arrays(run):
    assert run(2, summed) == [([1.0] * 3, [0.0] * 3, [1.0] * 3), ([1.0] * 3, [1.0] * 3, [1.0] * 3)]


def test_jax_models_compute_what_numpy_models_compute():
    jax = pytest.importorskip("jax", reason="JAX is not installed: pip install jax")
    from trainfleet.mpi.cross_entropy import cross_entropy

    plain, model = mlp([4, 6, 3]), mlp([4, 6, 3])
    for name, value in model.parameters.items():
        model.parameters[name] = jax.numpy.asarray(value)
    x, targets = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32), np.array([0, 1, 2, 0, 1])
    found = []
    for each, kind in ((plain, np.asarray), (model, jax.numpy.asarray)):
        y, saved = each.forward(kind(x))
        loss, dy = cross_entropy(y, kind(targets))
        _, gradients = each.backward(saved, dy)
        found.append((loss.total, {name: to_numpy(value) for name, value in gradients.items()}))
    assert type(gradients["0.weight"]).__module__.startswith("jax")
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    for name, value in found[0][1].items():
        np.testing.assert_allclose(value, found[1][1][name], rtol=1e-4, atol=1e-6)


def jax_averaged(group):
    import jax.numpy as jnp

    from trainfleet.mpi.average import average_gradients

    (mean,) = average_gradients([jnp.full(3, float(group.rank))], group)
    return type(mean).__module__.split(".")[0], np.asarray(mean).tolist()


def test_gradients_of_jax_are_averaged_and_stay_jax(run):
    pytest.importorskip("jax", reason="JAX is not installed: pip install jax")
    assert {kind for kind, _ in run(2, jax_averaged)} <= {"jax", "jaxlib"}
    assert [mean for _, mean in run(2, jax_averaged)] == [[0.5] * 3] * 2


def test_arrays_of_cupy_come_back_to_their_gpu():
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed, or there is no GPU")
    array = cupy.arange(3.0)
    assert type(like(array, to_numpy(array) * 2)) is type(array)
