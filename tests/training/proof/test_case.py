"""One process and many ranks do the same work, or it is said what had to be changed."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from oracle import case_of_model  # noqa: E402

from trainfleet.plan import LossScale, Plan  # noqa: E402
from trainfleet.training.proof.case import comparable, together  # noqa: E402


def test_batch_statistics_are_compared_with_the_whole_batch() -> None:
    shared, _, remarks = comparable(case_of_model("convolutional"), Plan())
    changed = together(shared, 2)
    images, _ = changed.micro_batch(3)
    assert len(images) == 2 * len(case_of_model("convolutional").micro_batch(0)[0])
    assert "batch statistics" in remarks[0]
    assert changed.accumulation == 1
    assert together(case_of_model("transformer"), 2).accumulation == 2


def test_what_cannot_be_compared_is_switched_off_and_said() -> None:
    work = case_of_model("convolutional", keep_activations=True)
    shared, plan, remarks = comparable(work, Plan(precision="fp16"))
    assert not shared.keep_activations and plan.loss_scale.initial == 1024.0 and len(remarks) == 1
    low = Plan(precision="fp16", loss_scale=LossScale(initial=8.0))
    assert comparable(work, low)[1] == low
    shared, plan, [remark] = comparable(case_of_model("scalars", keep_activations=True), Plan(compile=True))
    assert not shared.keep_activations and plan.compile and "Compiled blocks" in remark
    unchanged = (case_of_model("scalars", keep_activations=True), Plan(precision="fp16"))
    assert comparable(*unchanged) == (*unchanged, ())
