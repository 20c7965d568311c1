"""Arrays of other libraries: in by DLPack, out in the library and on the device they came from."""

from __future__ import annotations

import os

import numpy as np
import pytest

from trainfleet.comm.threads import run_ranks
from trainfleet.mpi.arrays import all_sum, for_group, like, namespace, to_numpy
from trainfleet.mpi.cross_entropy import cross_entropy
from trainfleet.mpi.layers import mlp
from trainfleet.mpi.mesh import Mesh
from trainfleet.mpi.optimizers import AdamW
from trainfleet.mpi.trainer import Trainer
from trainfleet.plan import Plan


def test_numpy_passes_as_it_is():
    array = np.ones(3)
    assert namespace(array) is np and to_numpy(array) is array and like(array, array) is array


def test_tensors_become_views_by_dlpack():
    torch = pytest.importorskip("torch", reason="the other library here is torch")
    tensor = torch.ones(3)
    to_numpy(tensor)[0] = 5
    assert tensor[0] == 5


class StandIn(np.ndarray):
    """Stands in for CuPy's array where there is no GPU: what it offers and refuses, in the memory of the CPU."""

    __cuda_array_interface__: dict = {}  # noqa: RUF012
    num_copies = 0

    def get(self):
        StandIn.num_copies += 1
        return np.array(self.view(np.ndarray))

    def __array_namespace__(self, **_):
        return CUPY

    def __array_ufunc__(self, ufunc, method, *inputs, **keywords):
        if any(type(each) is np.ndarray and each.ndim for each in inputs):
            raise TypeError("Unsupported type <class 'numpy.ndarray'>")  # CuPy's words
        plain = [each.view(np.ndarray) if isinstance(each, StandIn) else each for each in inputs]
        if "out" in keywords:
            keywords["out"] = tuple(each.view(np.ndarray) for each in keywords["out"])
        result = getattr(ufunc, method)(*plain, **keywords)
        return np.asarray(result).view(StandIn) if isinstance(result, np.ndarray | np.generic) else result


class _CuPy:
    """Its functions: NumPy's, answering with stand-ins."""

    num_waits = 0
    cuda = property(lambda self: self)

    def get_current_stream(self):
        return self

    def synchronize(self):
        self.num_waits += 1

    def __getattr__(self, name):
        function = getattr(np, name)

        def call(*arguments, **keywords):
            result = function(*arguments, **keywords)
            return result.view(StandIn) if isinstance(result, np.ndarray) else result

        return call


CUPY = _CuPy()


def trained(group, plan, kind, aware, micro_batches=2):
    """Losses of a model of such arrays, how often they were copied to the CPU, and the kind that came out."""
    if aware:
        os.environ["MPICH_GPU_SUPPORT_ENABLED"] = "1"  # as on a machine whose MPI reads the memory of GPUs
    try:
        model = mlp([6, 8, 8, 4], dtype=np.float32)
        for name, value in model.parameters.items():
            model.parameters[name] = kind(value)
        mesh = Mesh(group, plan)
        data, draw = mesh.data_axes, np.random.default_rng(0)
        batch = draw.normal(size=(12, 6)).astype(np.float32), draw.integers(0, 4, 12)
        own = tuple(each[data.rank :: data.size] for each in batch)
        trainer = Trainer(model, AdamW(), cross_entropy, [own] * 3, mesh=mesh, micro_batches=micro_batches)
        StandIn.num_copies = CUPY.num_waits = 0  # models are compared by copies, before the first step
        losses = trainer.fit(3)
        kinds = {type(value).__name__ for value in trainer.spread.model.parameters.values()}
        kinds |= {type(each).__name__ for held in trainer.spread.optimizer.memory.values() for each in held.values()}
        return losses, StandIn.num_copies, CUPY.num_waits, kinds
    finally:
        os.environ.pop("MPICH_GPU_SUPPORT_ENABLED", None)


def as_stand_in(array):
    return array.copy().view(StandIn)


def as_jax(array):
    import jax.numpy as jnp

    return jnp.asarray(array)


PLANS = [Plan(), Plan(tp=2), Plan(pp=2), Plan(zero=1), Plan(zero=2), Plan(zero=3)]


@pytest.fixture(scope="module")
def expected():
    (found,) = run_ranks(1, lambda group: trained(group, Plan(), np.copy, False))
    assert found[1:] == (0, 0, {"ndarray"})
    return found[0]


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_an_mpi_that_reads_the_memory_of_gpus_is_handed_it(run_mpi, expected, plan):
    for losses, num_copies, num_waits, kinds in run_mpi(2, trained, plan, as_stand_in, True):
        np.testing.assert_allclose(losses, expected, rtol=1e-5)
        assert (num_copies, kinds) == (0, {"StandIn"})
        assert num_waits > 0, "MPI must not read what the GPU has not yet written"


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_other_groups_get_copies_in_the_memory_of_the_cpu(run, expected, plan):
    for losses, num_copies, num_waits, kinds in run(2, trained, plan, as_stand_in, False):
        np.testing.assert_allclose(losses, expected, rtol=1e-5)
        assert num_copies > 0 and (num_waits, kinds) == (0, {"StandIn"})


def holds_for_jax(results, expected):
    for losses, _, _, kinds in results:
        np.testing.assert_allclose(losses, expected, rtol=1e-4)
        assert kinds == {"ArrayImpl"}


@pytest.mark.matrix
def test_a_model_of_jax_arrays_trains_as_one_of_numpy_and_stays_jax(expected):
    """JAX compiles each operator for each shape, which takes longer than all else here."""
    pytest.importorskip("jax", reason="JAX is not installed: pip install 'trainfleet[jax]'")
    holds_for_jax(run_ranks(2, lambda group: trained(group, Plan(zero=2), as_jax, False)), expected)


@pytest.mark.matrix
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_a_model_of_jax_arrays_trains_so_under_every_plan(run_mpi, expected, plan):
    pytest.importorskip("jax", reason="JAX is not installed: pip install 'trainfleet[jax]'")
    holds_for_jax(run_mpi(2, trained, plan, as_jax, False), expected)


class Reading:
    """A group that takes the memory of GPUs."""

    def takes(self, array):
        return True


def test_which_way_it_goes_is_said_once(caplog):
    import trainfleet.mpi.arrays as arrays

    arrays._said.clear()
    array = as_stand_in(np.arange(3.0))
    with caplog.at_level("INFO"):
        for _ in range(2):
            assert type(for_group(array, object())) is np.ndarray
            assert for_group(array, Reading()) is array
    assert [record.message for record in caplog.records] == [arrays.BY_COPY, arrays.DIRECT]


def summed(group):
    array = np.full(3, float(group.rank))
    return all_sum(array, group).tolist(), array.tolist(), all_sum(array, group, "max").tolist()


def test_sums_are_new_arrays(run):
    assert run(2, summed) == [([1.0] * 3, [0.0] * 3, [1.0] * 3), ([1.0] * 3, [1.0] * 3, [1.0] * 3)]


def test_jax_models_compute_what_numpy_models_compute():
    jax = pytest.importorskip("jax", reason="JAX is not installed: pip install 'trainfleet[jax]'")
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
    pytest.importorskip("jax", reason="JAX is not installed: pip install 'trainfleet[jax]'")
    assert {kind for kind, _ in run(2, jax_averaged)} <= {"jax", "jaxlib"}
    assert [mean for _, mean in run(2, jax_averaged)] == [[0.5] * 3] * 2


def test_arrays_of_cupy_come_back_to_their_gpu():
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed, or there is no GPU: a stand-in is tried above")
    array = cupy.arange(3.0)
    assert type(like(array, to_numpy(array) * 2)) is type(array)
    losses, _, _, kinds = run_ranks(1, lambda group: trained(group, Plan(), cupy.asarray, False))[0]
    assert kinds == {"ndarray"} and losses[2] < losses[0]
