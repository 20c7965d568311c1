"""Passes over held-out data are told with what was tracked in them, and end a run that gains nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

pytest.importorskip("torch")

from trainfleet.comm.group import Group
from trainfleet.comm.threads import run_ranks
from trainfleet.errors import ConfigError
from trainfleet.loss import LossSum
from trainfleet.tracks import Tracks, track
from trainfleet.training.evaluations import Evaluations


class Counting:
    """An engine whose loss is the mean of the batches."""

    def evaluate(self, batches: Iterable[Any]) -> LossSum:
        numbers = list(batches)
        for number in numbers:
            track("largest", number, reduce="max")
        return LossSum(sum(numbers), len(numbers))


def evaluations(group: Group, patience: int | None = None) -> Evaluations:
    return Evaluations(lambda: [1.0, 2.0 + group.rank], patience=patience, world=group, new_tracks=Tracks)


def test_an_evaluation_has_the_numbers_tracked_in_it_on_all_ranks() -> None:
    def run(group: Group) -> tuple[float, Any, Any, Any]:
        held_out = evaluations(group)
        with Tracks() as of_training:
            told = held_out.run(Counting(), None, 7)  # type: ignore[arg-type]
        assert of_training.take() == []
        return told.step, dict(told.metrics), held_out.metrics_at(7) == {"loss": told.loss}, held_out.metrics_at(8)

    assert run_ranks(2, run) == [(7, {"largest": 3.0}, True, {})] * 2


def test_early_stopping_counts_evaluations_without_gain_also_after_a_resume() -> None:
    def run(group: Group) -> list[bool]:
        before = evaluations(group, patience=2)
        said = [before.is_enough(loss) for loss in (3.0, 2.0, 2.0)]
        after = evaluations(group, patience=2)
        after.load_state_dict(before.state_dict())
        return [*said, after.is_enough(2.5), evaluations(group).is_enough(1.0)]

    assert run_ranks(1, run) == [[False, False, False, True, False]]


def test_nothing_to_evaluate_on_is_an_error() -> None:
    def run(group: Group) -> None:
        nothing = Evaluations(None, patience=None, world=group, new_tracks=Tracks)
        with pytest.raises(ConfigError, match="nothing to evaluate on"):
            nothing.run(Counting(), None, 1)  # type: ignore[arg-type]

    run_ranks(1, run)
