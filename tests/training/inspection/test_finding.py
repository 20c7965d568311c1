"""A finding is read by people, and by programs from JSON."""

from __future__ import annotations

import json
import math

import pytest

pytest.importorskip("torch")

from trainfleet.training.inspection.finding import Finding, told_ranks
from trainfleet.training.inspection.values import Values

VALUES = Values(shape=(8, 4), dtype="float32", num_nan=4, num_plus_inf=0, num_minus_inf=0, largest=2.0)
FINDING = Finding(
    step=812,
    kind="module",
    phase="forward",
    rank=1,
    ranks=(1,),
    module="blocks.2.up",
    tensor="its output",
    what="blocks.2.up was given what is finite and gave NaN in its output",
    values=VALUES,
    micro_batch=0,
    rows=(3,),
    samples=("sample 37 (position 27 of epoch 0)",),
    indices=(37,),
    loss=math.nan,
    grad_norm=math.inf,
    remarks=("A remark.",),
    path="runs/a/anomalies/step_000812",
)


def test_it_survives_json_whose_numbers_are_finite() -> None:
    text = json.dumps(FINDING.to_plain(), allow_nan=False)
    back = Finding.from_plain(json.loads(text))
    assert str(back) == str(FINDING) and back.values == VALUES and math.isnan(back.loss) and back.rows == (3,)


@pytest.mark.parametrize("wrong", [[], {"kind": "other"}, {}])
def test_what_is_no_finding_is_refused(wrong: object) -> None:
    with pytest.raises(ValueError, match="where a finding belongs"):
        Finding.from_plain(wrong)  # type: ignore[arg-type]


def test_a_person_reads_sentence_values_samples_and_place() -> None:
    assert str(FINDING).splitlines() == [
        "blocks.2.up was given what is finite and gave NaN in its output.",
        "values   4 nan of 32 (float32 [8, 4]; finite up to 2)",
        "samples  sample 37 (position 27 of epoch 0)",
        "step     812: loss nan, norm of the gradient inf",
        "saved    runs/a/anomalies/step_000812",
        "note: A remark.",
    ]


def test_the_ranks_that_were_clean_are_said_to_be() -> None:
    assert told_ranks((0,), 0, 1) == ""
    assert told_ranks((3,), 0, 4) == ", on rank 3 alone; the other 3 computed what is finite"
    assert told_ranks((1,), 0, 2) == ", on rank 1 alone; the other computed what is finite"
    assert told_ranks((1,), 1, 2) == ", on rank 1, from which it came to 1 other"
    assert told_ranks((1,), 3, 8) == ", on rank 1, from which it came to 3 others"
    assert told_ranks((1, 2), 0, 4) == ", on 2 of 4 ranks, 1 first"
    assert told_ranks((0, 1), 0, 2) == ", on all 2 ranks"
