"""Whatever is killed or cut, a fed run uses each sample once an epoch and has the weights of the run without faults."""

from __future__ import annotations

import pytest
from faults.running import KINDS, run_with_faults

pytestmark = pytest.mark.cluster


@pytest.mark.parametrize(("faults", "seed"), [(20, 0), pytest.param(200, 1, marks=pytest.mark.matrix)])
def test_every_sample_once_an_epoch_and_the_same_weights(tmp_path, faults, seed):
    outcome = run_with_faults(tmp_path, faults=faults, seed=seed)
    assert outcome.faults.total() == faults and set(outcome.faults) == set(KINDS)
    assert (outcome.lost, outcome.doubled) == (0, 0)
    assert outcome.same_order and outcome.same_weights


def test_a_peer_without_leases_loses_samples_in_the_same_harness(tmp_path):
    """The harness can tell: it is no proof if nothing ever fails it. What a fault hits is up to the moment."""
    outcomes = (
        run_with_faults(tmp_path / str(seed), faults=5, seed=seed, peer=True, seconds_a_sample=0.001)
        for seed in range(4)
    )
    assert any(outcome.lost > 0 and outcome.doubled > 0 and not outcome.same_weights for outcome in outcomes)
