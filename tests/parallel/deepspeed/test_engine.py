"""DeepSpeed computes what one process computes, in every stage; a run may change engines and stages and go on."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from models import MODELS
from oracle import plain_trace
from rank_pool import RankPools

from trainfleet.deps import installed
from trainfleet.errors import DataError, PlanError
from trainfleet.mesh import Mesh
from trainfleet.parallel import Engine, NativeEngine, make_engine, parallelize
from trainfleet.parallel.deepspeed.engine import DeepSpeedEngine
from trainfleet.plan import LossScale, Plan
from trainfleet.training.proof.case import Case
from trainfleet.training.proof.trace import trace
from trainfleet.training.proof.verdict import Trace, compare

pytestmark = pytest.mark.skipif(installed("deepspeed") is None, reason="DeepSpeed is not installed")

TRANSFORMER = MODELS["transformer"]


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    # As large as this, eps keeps Adam from making full steps out of rounding.
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)


def case_of(name: str = "transformer", accumulation: int = 2, steps: int = 3, **options: float) -> Case:
    return Case(
        build=partial(MODELS[name].build, 0, **options),
        loss_fn=MODELS[name].loss_fn,
        micro_batch=partial(MODELS[name].micro_batch, 0),
        optimizer=adamw,
        steps=steps,
        accumulation=accumulation,
        clip_norm=0.5,
    )


def traced(plans: list[Plan], name: str = "transformer") -> list[Trace]:
    found = []
    for plan in plans:
        with Mesh.from_env(plan) as mesh:
            found.append(trace(case_of(name), plan, mesh))
    return found


def with_deepspeed(**settings: object) -> Plan:
    return Plan(engine="deepspeed", engine_required=True, **settings)  # type: ignore[arg-type]


STAGES = [with_deepspeed(zero=zero) for zero in (0, 1, 2, 3)]
OFFLOADED = [with_deepspeed(zero=zero, offload="optimizer") for zero in (1, 2, 3)]
OFFLOADED.append(with_deepspeed(zero=3, offload="parameters"))


@pytest.mark.parametrize("plans", [STAGES, pytest.param(OFFLOADED, marks=pytest.mark.matrix)], ids=["", "offloaded"])
def test_every_stage_computes_what_one_process_computes(ranks: RankPools, plans: list[Plan]) -> None:
    alone = plain_trace(case_of(), 2)
    for plan, found in zip(plans, ranks(2, traced, plans)[0], strict=True):
        verdict = compare(alone, found, "fp32")
        assert verdict.holds, f"{plan}: {verdict}"


NARROW = [
    with_deepspeed(zero=2, precision="bf16", recompute="blocks"),
    with_deepspeed(zero=3, precision="bf16", microbatches=2),
    with_deepspeed(zero=1, precision="fp16", loss_scale=LossScale(initial=1024.0)),
]


def test_narrow_precision_has_the_numbers_of_one_process_of_our_own_engine(ranks: RankPools) -> None:
    found = ranks(2, traced, NARROW)[0]
    for plan, each in zip(NARROW, found, strict=True):
        alone = Plan(precision=plan.precision, microbatches=plan.microbatches, loss_scale=plan.loss_scale)
        with Mesh.from_env(alone) as mesh:
            reference = trace(case_of(accumulation=4), alone, mesh)
        verdict = compare(reference, each, plan.precision)
        assert verdict.holds, f"{plan}: {verdict}"


def traced_with_dropout(plan: Plan, accumulation: int) -> Trace:
    with Mesh.from_env(plan) as mesh:
        return trace(case_of(accumulation=accumulation, steps=2, dropout=0.2), plan, mesh)


def test_dropout_is_that_of_one_process(ranks: RankPools) -> None:
    verdict = compare(
        traced_with_dropout(Plan(), 4), ranks(2, traced_with_dropout, with_deepspeed(zero=2), 2)[0], "fp32"
    )
    assert verdict.holds, str(verdict)


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["convolutional", "recurrent"])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_other_models_on_any_number_of_ranks(ranks: RankPools, name: str, num_ranks: int) -> None:
    if name == "convolutional" and num_ranks > 1:
        pytest.skip("batch statistics of all ranks together: tests/cluster/test_parity.py says how to compare them")
    plans = [with_deepspeed(zero=zero) for zero in (0, 1, 2, 3)]
    alone = plain_trace(case_of(name), num_ranks)
    for found in ranks(num_ranks, traced, plans, name)[0]:
        verdict = compare(alone, found, "fp32")
        assert verdict.holds, str(verdict)


# ── what a step leaves ────────────────────────────────────────────────────────────────────────────────────────────


def engine_of(plan: Plan, mesh: Mesh, name: str = "transformer") -> Engine:
    torch.manual_seed(0)
    model = parallelize(MODELS[name].build(0), mesh, plan)
    return make_engine(model, adamw(model), failing_loss if name == "transformer" else MODELS[name].loss_fn)


def failing_loss(output: torch.Tensor, batch: dict[str, torch.Tensor]) -> object:
    if "fail" in batch:
        raise RuntimeError("a sample too many")
    return TRANSFORMER.loss_fn(output, batch)


def step(engine: Engine, number: int) -> float:
    group = engine.mesh.data_axes  # type: ignore[attr-defined]
    loss = engine.forward_backward([TRANSFORMER.micro_batch(0, number * group.size + group.rank)])
    engine.clip(1.0)
    assert engine.step()
    return loss.mean


def odd_steps(plan: Plan) -> tuple[list[float], list[float]]:
    """Losses after steps that were dropped, failed or only evaluated in between, and without any of that."""
    with Mesh.from_env(plan) as mesh:
        plainly = engine_of(plan, mesh)
        assert isinstance(plainly, DeepSpeedEngine)
        expected = [step(plainly, number) for number in range(4)]
    with Mesh.from_env(plan) as mesh:
        engine = engine_of(plan, mesh)
        found = [step(engine, 0)]
        engine.forward_backward([TRANSFORMER.micro_batch(1, 0), TRANSFORMER.micro_batch(1, 1)])
        engine.clip(1.0)  # and nobody steps
        found.append(step(engine, 1))
        engine.evaluate([TRANSFORMER.micro_batch(2, 0)])
        with pytest.raises(DataError, match="weight 0"):
            weightless = TRANSFORMER.micro_batch(0, 0)
            engine.forward_backward([{**weightless, "target": torch.full_like(weightless["target"], -100)}])
        with pytest.raises(RuntimeError, match="a sample too many"):
            engine.forward_backward([TRANSFORMER.micro_batch(1, 0), {**TRANSFORMER.micro_batch(1, 1), "fail": True}])
        found.append(step(engine, 2))
        found.append(step(engine, 3))
    return expected, found


@pytest.mark.parametrize("zero", [pytest.param(2, marks=pytest.mark.matrix), 3])
def test_a_step_that_nobody_takes_leaves_nothing_behind(ranks: RankPools, zero: int) -> None:
    plan = with_deepspeed(zero=zero)
    for expected, found in ranks(2, odd_steps, plan):
        assert found == pytest.approx(expected, rel=1e-6)


def overflowing(plan: Plan) -> tuple[list[bool], list[float | None]]:
    with Mesh.from_env(plan) as mesh:
        engine = engine_of(plan, mesh)
        steps, scales = [], []
        for number in range(6):
            engine.forward_backward([TRANSFORMER.micro_batch(0, number)])
            steps.append(engine.step())
            scales.append(engine.loss_scale)  # type: ignore[attr-defined]
        return steps, scales


def test_an_overflow_skips_the_step_and_halves_the_scale_as_in_our_own_engine(ranks: RankPools) -> None:
    scale = LossScale(initial=2.0**19)
    ours = ranks(2, overflowing, Plan(zero=2, precision="fp16", loss_scale=scale))[0]
    theirs = ranks(2, overflowing, with_deepspeed(zero=2, precision="fp16", loss_scale=scale))[0]
    assert theirs == ours
    assert not ours[0][0] and ours[0][-1]


# ── from one engine to another ────────────────────────────────────────────────────────────────────────────────────

WAY = [
    Plan(zero=3),
    with_deepspeed(zero=2),
    with_deepspeed(zero=3),
    Plan(zero=0),
    with_deepspeed(zero=0),
    with_deepspeed(zero=1),
    Plan(zero=2),
]


def along(plans: list[Plan]) -> list[float]:
    """The losses of two steps under each plan, each going on from what the one before has saved."""

    losses: list[float] = []
    kept = None
    for plan in plans:
        with Mesh.from_env(plan) as mesh:
            engine = engine_of(plan, mesh)
            if kept is not None:
                for name, part in engine.state().items():
                    taken_over(part, kept[name])
            losses += [step(engine, len(losses)), step(engine, len(losses) + 1)]
            kept = {name: gathered(part.state_dict(), mesh) for name, part in engine.state().items()}
    return losses


def gathered(state: object, mesh: Mesh) -> object:
    """Every piece as a whole NumPy array."""
    from trainfleet.state import ShardedArray

    if isinstance(state, dict):
        return {key: gathered(value, mesh) for key, value in state.items()}
    if isinstance(state, ShardedArray):
        import numpy as np

        whole = np.full(state.global_shape, np.nan)
        for piece in mesh.world.exchange([state.offsets, list(state.shape), state.local.double().tolist()]):
            offsets, shape, values = piece
            if 0 not in shape:
                whole[tuple(slice(at, at + n) for at, n in zip(offsets, shape))] = values
        assert not np.isnan(whole).any()
        return whole
    return state


def taken_over(part: object, kept: object) -> None:
    from trainfleet.state import ShardedArray

    def filled(live: object, whole: object) -> object:
        if isinstance(live, dict):
            return {key: filled(value, whole[key]) for key, value in live.items()}  # type: ignore[index]
        if isinstance(live, ShardedArray):
            cut = whole[tuple(slice(at, at + n) for at, n in zip(live.offsets, live.shape))]  # type: ignore[index]
            live.local.copy_(torch.as_tensor(cut))
            return live
        return whole

    state = part.state_dict()  # type: ignore[attr-defined]
    part.load_state_dict(filled(state, kept))  # type: ignore[attr-defined]


def test_a_run_goes_on_in_another_engine_and_stage_with_the_optimizers_memory(ranks: RankPools) -> None:
    expected = ranks(2, along, [Plan(zero=0)] * len(WAY))[0]
    assert ranks(2, along, WAY)[0] == pytest.approx(expected, rel=2e-5)


# ── what is refused ───────────────────────────────────────────────────────────────────────────────────────────────


def refusal(name: str, zero: int) -> str:
    plan = with_deepspeed(zero=zero)
    with Mesh.from_env(plan) as mesh, pytest.raises(PlanError) as caught:
        model = parallelize(MODELS[name].build(0), mesh, plan)
        engine = make_engine(model, adamw(model), MODELS[name].loss_fn)
        engine.forward_backward([MODELS[name].micro_batch(0, mesh.rank)])
    return str(caught.value)


class Unused(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = torch.nn.Linear(5, 1), torch.nn.Linear(5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x).squeeze(-1)


def refusal_of_unused(zero: int) -> str:
    plan = with_deepspeed(zero=zero)
    case = MODELS["scalars"]
    with Mesh.from_env(plan) as mesh, pytest.raises(PlanError) as caught:
        torch.manual_seed(0)
        model = parallelize(Unused(), mesh, plan)
        make_engine(model, adamw(model), case.loss_fn).forward_backward([case.micro_batch(0, mesh.rank)])
    return str(caught.value)


def test_what_deepspeed_would_compute_otherwise_is_refused(ranks: RankPools) -> None:
    assert "unused.weight got a gradient in 0 of the 2 micro-batches" in ranks(2, refusal_of_unused, 1)[0]
    assert "has no dimension" in ranks(2, refusal, "scalars", 2)[0]
    assert "without a __dict__" in ranks(2, refusal, "own_loss", 3)[0]


def test_the_plan_chooses_the_engine() -> None:
    with Mesh.from_env(Plan()) as mesh:
        assert isinstance(engine_of(Plan(), mesh), NativeEngine)
