"""A crew makes batches in this process or opens a pool of workers for it."""

from __future__ import annotations

import pytest

from trainfleet.data.crew import Workers
from trainfleet.data.sampler import Span
from trainfleet.data.samples import Made
from trainfleet.errors import DataError


class Positions:
    """Makes of a span its first position."""

    def make(self, span, *, progress, poison):
        return Made(span.begin)


def test_without_workers_batches_are_made_when_asked():
    crew = Workers(maker=Positions())
    assert crew.open() is None and crew.depth == 1
    assert crew.make(Span(0, 7, 9)).batch == 7


def test_with_workers_they_are_made_ahead_by_processes():
    crew = Workers(maker=Positions(), workers=2, prefetch=3)
    assert crew.depth == 6
    pool = crew.open()
    try:
        for task in range(4):
            pool.submit(task, Span(0, 10 * task, 10 * task + 1))
        assert [pool.receive(task).batch for task in (2, 0, 3, 1)] == [20, 0, 30, 10]
        assert len(pool.pids) == 2
    finally:
        pool.close()


@pytest.mark.parametrize("wrong", [{"workers": -1}, {"prefetch": 0}, {"bad": "maybe"}])
def test_what_cannot_be_is_refused(wrong):
    with pytest.raises(DataError, match=next(iter(wrong))):
        Workers(maker=Positions(), **wrong)
