"""Whatever the plan, the losses are those of one process."""

from __future__ import annotations

import numpy as np
import pytest

from trainfleet.codec import BFloat16
from trainfleet.comm.threads import run_ranks
from trainfleet.errors import DataError
from trainfleet.events import StepEnded
from trainfleet.mpi.cross_entropy import cross_entropy
from trainfleet.mpi.layers import mlp
from trainfleet.mpi.mesh import Mesh
from trainfleet.mpi.optimizers import AdamW
from trainfleet.mpi.timers import Timers
from trainfleet.mpi.trainer import Trainer
from trainfleet.plan import Plan

STEPS = 5


def batches(rank, size):
    """Of 13 samples a step, so that ranks and micro-batches hold unequal numbers."""
    draw = np.random.default_rng(0)
    while True:
        x, targets = draw.normal(size=(13, 6)), draw.integers(0, 4, 13)
        yield x[rank::size], targets[rank::size]


def losses(group, plan, schedule="1f1b"):
    mesh = Mesh(group, plan)
    data = mesh.data_axes
    trainer = Trainer(
        mlp([6, 8, 8, 4], dtype=np.float64),
        AdamW(learning_rate=0.05),
        cross_entropy,
        batches(data.rank, data.size),
        mesh=mesh,
        micro_batches=3,
        schedule=schedule,
    )
    return trainer.fit(STEPS)


@pytest.fixture(scope="module")
def expected():
    (found,) = run_ranks(1, lambda group: losses(group, Plan()))
    assert len(set(found)) == STEPS
    return found


PLANS_OF_2 = [Plan(), Plan(tp=2), Plan(pp=2), *(Plan(zero=stage) for stage in (1, 2, 3))]
PLANS_OF_2 += [Plan(recompute="blocks"), Plan(zero=3, recompute="blocks")]
PLANS_OF_4 = [Plan(), Plan(dp_replicate=2, tp=2, pp=1), Plan(tp=2, pp=2), Plan(zero=3, tp=2), Plan(zero=2, pp=2)]
PLANS_OF_4 += [Plan(zero=3, pp=2), Plan(tp=4), Plan(zero=1, dp_shard=2, dp_replicate=2), Plan(zero=3, dp_replicate=2)]


@pytest.mark.parametrize("plan", PLANS_OF_2, ids=str)
def test_two_ranks_have_the_losses_of_one_process(run, expected, plan):
    for found in run(2, losses, plan):
        np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize("plan", PLANS_OF_4, ids=str)
def test_four_ranks_have_the_losses_of_one_process(run, expected, plan):
    for found in run(4, losses, plan, "gpipe"):
        np.testing.assert_allclose(found, expected, rtol=1e-9)


def watched(group):
    seen, timers = [], Timers(group)
    mesh = Mesh(timers.group, Plan())
    observer = type("Seen", (), {"on_event": lambda self, event: seen.append(event)})()
    data = mesh.data_axes
    trainer = Trainer(
        mlp([6, 4]), AdamW(), cross_entropy, batches(data.rank, data.size), mesh=mesh,
        codec=BFloat16(), observers=[observer], timers=timers,
    )  # fmt: skip
    found = trainer.fit(2) + trainer.fit(3)
    assert [event.loss for event in seen] == found and all(isinstance(event, StepEnded) for event in seen)
    return timers.gathered()


def test_steps_are_events_and_phases_are_timed(run):
    for phases in run(2, watched):
        assert list(phases) == ["data", "forward and backward", "update"]
        assert phases["update"].count == 3 and phases["update"].communication.median > 0


def test_a_batch_that_is_too_small_is_refused():
    def small(group):
        mesh = Mesh(group)
        batch = {"input": np.ones((2, 6)), "target": np.zeros(2, int)}
        Trainer(mlp([6, 4]), AdamW(), cross_entropy, [batch], mesh=mesh, micro_batches=3).fit(1)

    with pytest.raises(DataError, match="A batch of 2 cannot be cut into 3 micro-batches"):
        run_ranks(1, small)


def test_batches_that_end_too_early_are_said():
    def few(group):
        batch = (np.ones((2, 6)), np.zeros(2, int))
        Trainer(mlp([6, 4]), AdamW(), cross_entropy, [batch], mesh=Mesh(group)).fit(2)

    with pytest.raises(DataError, match="The batches ended after step 1"):
        run_ranks(1, few)
