"""Both schedules give the gradients of one process, and hold as many micro-batches as they say."""

from __future__ import annotations

import numpy as np
import pytest

from trainfleet.comm.threads import run_ranks
from trainfleet.errors import PlanError
from trainfleet.mpi.cross_entropy import cross_entropy
from trainfleet.mpi.layers import mlp
from trainfleet.mpi.pipeline import SCHEDULES, added, run_pipeline
from trainfleet.mpi.placement import place_layers

WIDTHS = [4, 6, 6, 6, 3]


def micro_batches(count):
    """Of unequal sizes."""
    draw = np.random.default_rng(0)
    return [(draw.normal(size=(2 + i % 3, 4)), draw.integers(0, 3, 2 + i % 3)) for i in range(count)]


def passed(group, schedule, count):
    stage = place_layers(mlp(WIDTHS, dtype=np.float64), group)
    return run_pipeline(stage, micro_batches(count), cross_entropy, group, schedule)


def in_one_process(count):
    model, total, gradients = mlp(WIDTHS, dtype=np.float64), 0.0, {}
    for x, targets in micro_batches(count):
        y, saved = model.forward(x)
        loss, dy = cross_entropy(y, targets)
        gradients = added(gradients, model.backward(saved, dy)[1])
        total += loss.total
    return total, gradients


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_pipeline_computes_what_one_process_computes(run, schedule, size, count):
    total, gradients = in_one_process(count)
    results = run(size, passed, schedule, count)
    joined = {}
    for rank, result in enumerate(results):
        assert result.loss.total == pytest.approx(total)
        assert result.loss.weight == sum(len(x) for x, _ in micro_batches(count))
        assert result.most_held == (count if schedule == "gpipe" else min(count, size - rank))
        joined |= result.gradients
    assert joined.keys() == gradients.keys()
    for name, gradient in gradients.items():
        np.testing.assert_allclose(joined[name], gradient, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_micro_batch_goes_forward_once_and_then_backward_once(schedule):
    for size in range(1, 6):
        for count in range(1, 9):
            for rank in range(size):
                actions = SCHEDULES[schedule](rank, size, count)
                assert sorted(actions) == sorted((kind, i) for kind in ("forward", "backward") for i in range(count))
                assert all(actions.index(("forward", i)) < actions.index(("backward", i)) for i in range(count))


def test_an_unknown_schedule_is_refused():
    with pytest.raises(PlanError, match="use one of gpipe, 1f1b"):
        run_ranks(1, lambda group: passed(group, "zigzag", 1))
