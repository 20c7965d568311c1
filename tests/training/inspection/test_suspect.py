"""Of what several ranks saw, the first in the order of computation is taken."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("torch")

from trainfleet.training.inspection.suspect import Suspect, first_of
from trainfleet.training.inspection.values import Lines, Values

VALUES = Values(shape=(2,), dtype="float32", num_nan=1, num_plus_inf=0, num_minus_inf=0, largest=0.0)


def suspect(*order: int) -> Suspect:
    micro_batch, stage, at = order
    return Suspect(
        kind="module",
        phase="forward",
        module="m",
        tensor="its output",
        what="m did it",
        values=VALUES,
        lines=Lines(((2, (1,)),)),
        micro_batch=0,
        order=(micro_batch, stage, at),
        around=("m",),
    )


def test_a_suspect_travels_as_json() -> None:
    one = suspect(0, 1, 2)
    assert Suspect.from_plain(json.loads(json.dumps(one.to_plain()))) == one


def test_micro_batches_come_before_stages_and_these_before_time() -> None:
    orders = [(1, 0, 0), (0, 1, 9), (0, 1, 5), (0, 1, 5)]
    assert first_of([(rank, 0, suspect(*order)) for rank, order in enumerate(orders)])[0] == 2
