"""Which checkpoints go: all but the newest, those kept for ever, and the best."""

from __future__ import annotations

import math

import pytest

from trainfleet.checkpoint import Retention
from trainfleet.errors import ConfigError


def removable(retention, steps):
    return retention.removable([(step, {}) for step in steps])


def test_the_last_and_one_of_each_so_many_are_kept():
    assert removable(Retention(last=2), [1, 2, 3, 4]) == [1, 2]
    assert removable(Retention(last=2, every=20), [10, 20, 30, 40, 50]) == [10, 30]
    assert removable(Retention(last=3), [5, 6]) == []


def test_last_means_the_order_of_commits_and_not_of_steps():
    assert removable(Retention(last=1), [100, 200, 50]) == [100, 200]


LOSSES = [(1, {"loss": 3.0}), (2, {"loss": 1.0}), (3, {}), (4, {"loss": 2.0}), (5, {"loss": 1.0}), (6, {"loss": 9.0})]


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        (Retention(last=1, best=1), [5, 6]),
        (Retention(last=1, best=2), [2, 5, 6]),
        (Retention(last=1, best=3), [2, 4, 5, 6]),
        (Retention(last=1, best=1, mode="max"), [6]),
        (Retention(last=1, best=2, mode="max"), [1, 6]),
        (Retention(last=1, best=9), [1, 2, 4, 5, 6]),
        (Retention(last=1, best=1, metric="accuracy"), [6]),
        (Retention(last=1, best=1, every=3), [3, 5, 6]),
    ],
)
def test_the_best_by_a_metric_are_kept(retention, kept):
    assert sorted({step for step, _ in LOSSES} - set(retention.removable(LOSSES))) == kept


def test_what_is_not_a_number_is_never_the_best():
    committed = [(1, {"loss": math.nan}), (2, {"loss": math.inf}), (3, {"loss": 1.0}), (4, {})]
    assert Retention(last=1, best=1).removable(committed) == [1, 2]


@pytest.mark.parametrize("wrong", [{"last": 0}, {"every": 0}, {"best": 0}, {"mode": "least"}])
def test_what_keeps_nothing_is_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Retention(**wrong)


@pytest.mark.parametrize(
    ("damaged", "removed"),
    [
        ([], [1, 2, 3]),
        ([4], [1, 2]),  # the last two that count are 3 and 5
        ([3, 4], [1]),
        ([2, 3], [1, 2, 3]),  # nothing is gained by keeping them
    ],
)
def test_damaged_ones_do_not_count_among_the_last(damaged, removed):
    assert Retention(last=2).removable([(step, {}) for step in (1, 2, 3, 4, 5)], damaged) == removed


def test_a_damaged_one_is_not_the_best():
    steps = [(1, {"loss": 1.0}), (2, {"loss": 2.0}), (3, {"loss": 3.0})]
    assert Retention(last=1, best=1).removable(steps) == [2]
    assert Retention(last=1, best=1).removable(steps, [1]) == [1]
