"""A pipeline computes what one process computes: to the bit where gradients are added in the same order."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from models import MODELS  # noqa: E402
from rank_pool import RankPools  # noqa: E402

from trainfleet.mesh import Mesh  # noqa: E402
from trainfleet.plan import Plan  # noqa: E402
from trainfleet.training.proof.case import Case, comparable, together  # noqa: E402
from trainfleet.training.proof.trace import trace  # noqa: E402
from trainfleet.training.proof.verdict import CONCATENATED_SLACK, Trace, compare, joined  # noqa: E402


def build(model: str, options: dict[str, Any]) -> Any:
    return MODELS[model].build(0, **options)


def micro_batch(model: str, number: int) -> Any:
    return MODELS[model].micro_batch(0, number)


def adamw(model: Any) -> Any:
    return torch.optim.AdamW(model.parameters(), lr=5e-3)


def case_of(model: str, accumulation: int = 4, **options: Any) -> Case:
    return Case(
        build=functools.partial(build, model, options),
        loss_fn=MODELS[model].loss_fn,
        micro_batch=functools.partial(micro_batch, model),
        optimizer=adamw,
        accumulation=accumulation,
    )


def traced(case: Case, plan: Plan) -> Trace:
    """What this rank has to tell, where it is the first of those that have the same."""
    torch.set_num_threads(1)
    with Mesh.from_env(plan) as mesh:
        found = trace(case, plan, mesh)
        return found if all(mesh[axis].rank == 0 for axis in mesh.plan_axes if axis != "pp") else {}


def check(ranks: RankPools, size: int, case: Case, plan: Plan, *, exact: bool = False) -> None:
    alone = Plan(precision=plan.precision, microbatches=plan.microbatches, loss_scale=plan.loss_scale)
    together = replace(case, accumulation=case.accumulation * plan.data_ranks(size))
    expected = ranks(1, traced, together, alone)[0]
    found = joined(ranks(size, traced, case, plan))
    if exact:
        unlike = [name for name in expected if not np.array_equal(found.get(name), expected[name])]
        # Squares of gradients are added stage by stage, in float64.
        different = [
            name for name in unlike if not name.endswith("norm") or abs(found[name] / expected[name] - 1) > 1e-14
        ]
        assert not different, f"{plan}: {different}"
        assert sorted(found) == sorted(expected)
    verdict = compare(expected, found, plan.precision)
    assert verdict.holds, f"{plan}: {verdict}"


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_a_plain_schedule_equals_one_process_to_the_bit_with_dropout(ranks: RankPools, schedule: Any) -> None:
    check(ranks, 2, case_of("transformer", dropout=0.2, depth=3), Plan(pp=2, schedule=schedule), exact=True)


SCHEDULES = ("gpipe", "1f1b", "interleaved_1f1b", "looped_bfs", "interleaved_zero_bubble", "zbv", "dualpipev")


@pytest.mark.matrix
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("model", ["transformer", "convolutional", "recurrent", "scalars"])
def test_every_schedule_computes_the_same_for_every_model(ranks: RankPools, model: str, schedule: Any) -> None:
    check(ranks, 2, case_of(model), Plan(pp=2, schedule=schedule))


@pytest.mark.matrix
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_a_model_that_returns_its_loss_and_calls_a_block_twice_is_cut(ranks: RankPools, schedule: Any) -> None:
    check(ranks, 2, case_of("own_loss"), Plan(pp=2, schedule=schedule))


@pytest.mark.matrix
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved_1f1b", "zbv"])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("model", ["transformer", "recurrent", "scalars"])
def test_every_zero_stage_goes_with_stages(ranks: RankPools, model: str, zero: Any, schedule: Any) -> None:
    case = case_of(model)
    names = ("blocks.*",) if zero in (1, 2) else ()
    check(ranks, 4, case, Plan(pp=2, zero=zero, schedule=schedule, blocks=names))


@pytest.mark.matrix
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("plan", [{"pp": 2}, {"pp": 2, "zero": 3}, {"pp": 2, "recompute": "blocks"}], ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_every_precision_goes_with_stages(ranks: RankPools, model: str, plan: Any, precision: Any) -> None:
    check(ranks, 2, case_of(model), Plan(precision=precision, **plan))


@pytest.mark.matrix
@pytest.mark.parametrize("plan", [{"tp": 2}, {"tp": 2, "recompute": "blocks"}, {"microbatches": 2}], ids=str)
@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_other_axes_go_with_stages(ranks: RankPools, schedule: Any, plan: Any) -> None:
    check(ranks, 2 * plan.get("tp", 1), case_of("transformer"), Plan(pp=2, schedule=schedule, **plan))


@pytest.mark.matrix
@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_batch_statistics_are_those_of_all_data_parallel_ranks(ranks: RankPools, schedule: Any) -> None:
    plan = Plan(pp=2, schedule=schedule)
    case, _, _ = comparable(case_of("convolutional"), plan)
    expected = ranks(1, traced, together(case, 2), Plan())[0]
    found = joined(ranks(4, traced, case, plan))
    verdict = compare(expected, found, "fp32", slack=CONCATENATED_SLACK["fp32"])
    assert verdict.holds, str(verdict)


@pytest.mark.matrix
@pytest.mark.parametrize("plan", [{"schedule": "1f1b"}, {"schedule": "zbv"}, {"zero": 3}], ids=str)
def test_compiled_blocks_pass_through_stages(ranks: RankPools, plan: Any) -> None:
    check(ranks, 2, case_of("transformer"), Plan(pp=2, compile=True, **plan))
