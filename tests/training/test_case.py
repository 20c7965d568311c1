"""One process and many ranks do the same work, or it is said what had to be changed."""

from __future__ import annotations

import functools
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from models import MODELS  # noqa: E402

from trainfleet.plan import LossScale, Plan  # noqa: E402
from trainfleet.training.case import Case, comparable, together  # noqa: E402


def build(name: str) -> Any:
    return MODELS[name].build(0)


def micro_batch(name: str, number: int) -> Any:
    return MODELS[name].micro_batch(0, number)


def adamw(model: Any) -> Any:
    return torch.optim.AdamW(model.parameters(), lr=5e-3)


def case(name: str, **options: Any) -> Case:
    return Case(
        build=functools.partial(build, name),
        loss_fn=MODELS[name].loss_fn,
        micro_batch=functools.partial(micro_batch, name),
        optimizer=adamw,
        **options,
    )


def test_batch_statistics_are_compared_with_the_whole_batch() -> None:
    shared, _, remarks = comparable(case("convolutional"), Plan())
    changed = together(shared, 2)
    images, _ = changed.micro_batch(3)
    assert len(images) == 2 * len(case("convolutional").micro_batch(0)[0])
    assert "batch statistics" in remarks[0]
    assert changed.accumulation == 1
    assert together(case("transformer"), 2).accumulation == 2


def test_what_cannot_be_compared_is_switched_off_and_said() -> None:
    work = case("convolutional", keep_activations=True)
    shared, plan, remarks = comparable(work, Plan(precision="fp16"))
    assert not shared.keep_activations and plan.loss_scale.initial == 1024.0 and len(remarks) == 1
    low = Plan(precision="fp16", loss_scale=LossScale(initial=8.0))
    assert comparable(work, low)[1] == low
    shared, plan, [remark] = comparable(case("scalars", keep_activations=True), Plan(compile=True))
    assert not shared.keep_activations and plan.compile and "Compiled blocks" in remark
    unchanged = (case("scalars", keep_activations=True), Plan(precision="fp16"))
    assert comparable(*unchanged) == (*unchanged, ())
