"""What a replay says of a step: its loss beside that of the run, for people and for programs."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

pytest.importorskip("torch")

from trainfleet.training.replay import Replayed

FOUND = Replayed(
    step=812, began=800, nproc=2, loss=0.5, grad_norm=1.5, recorded=0.5, first_other=None, parts=[], finding=None
)


@pytest.mark.parametrize(
    ("loss", "recorded", "first_other", "words"),
    [
        (0.5, 0.5, None, "the run's loss, to the bit"),
        (math.nan, math.nan, None, "the run's loss, to the bit"),
        (0.5, None, None, "the run has recorded no loss for it"),
        (0.5, 0.25, None, "the run's loss was 0.25, which is 1.0e+00 off"),
        (0.5, 0.25, 810, "which is 1.0e+00 off; the first step on the way to differ was 810"),
        (math.nan, 0.25, None, "the run's loss was 0.25"),
        (0.5, 0.0, None, "the run's loss was 0"),
    ],
)
def test_the_loss_stands_beside_that_of_the_run(
    loss: float, recorded: float | None, first_other: int | None, words: str
) -> None:
    found = replace(FOUND, loss=loss, recorded=recorded, first_other=first_other)
    assert words in found.compared() and "nan off" not in found.compared() and "inf off" not in found.compared()
    assert found.to_plain()["same_loss"] == ("to the bit" in words)


def test_lines_are_for_people_and_plain_values_for_programs() -> None:
    lines = replace(FOUND, remarks=("It was odd.",)).lines()
    assert lines[0] == "step 812 again, from the checkpoint of step 800, on 2 processes"
    assert "note: It was odd." in lines and lines[-1] == "Everything in it was finite."
    assert "from the begin of the run, on 1 process" in replace(FOUND, began=0, nproc=1).lines()[0]
    told = json.loads(json.dumps(replace(FOUND, loss=math.nan, recorded=math.inf).to_plain(), allow_nan=False))
    assert (told["loss"], told["recorded_loss"], told["finding"]) == ("nan", "inf", None)
