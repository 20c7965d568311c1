"""Split layers compute what one process computes: losses, gradients, norms and parameters after each step."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import pytest
import torch
from oracle import hold, traces
from rank_pool import RankPools
from split_models import PARTS, adamw, build, loss, tokens
from torch.distributed.tensor import DTensor

from trainfleet.errors import PlanError, ReplicasDiffer
from trainfleet.mesh import Mesh
from trainfleet.parallel import NativeEngine, parallelize
from trainfleet.parallel.replicas import check_replicas
from trainfleet.plan import Plan
from trainfleet.training.proof.case import Case
from trainfleet.training.proof.trace import trace
from trainfleet.training.proof.verdict import Trace, compare


def case_of(name: str, dropout: float = 0.0) -> Case:
    return Case(
        build=functools.partial(build, name, dropout),
        loss_fn=loss,
        micro_batch=tokens,
        optimizer=adamw,
        steps=3,
        accumulation=2,
        clip_norm=0.5,
    )


@pytest.mark.parametrize("name", PARTS)
def test_two_ranks_compute_what_one_process_computes(ranks: RankPools, name: str) -> None:
    hold(ranks, 2, case_of(name), [Plan(tp=2), Plan(tp=2, zero=2)])


FOUR = [Plan(tp=2), Plan(tp=4), Plan(tp=2, zero=1), Plan(tp=2, zero=2), Plan(tp=2, zero=3)]


def test_four_ranks_split_layers_and_shard_what_is_left(ranks: RankPools) -> None:
    hold(ranks, 4, case_of("grouped"), [Plan(tp=2, zero=3)])


@pytest.mark.matrix
@pytest.mark.parametrize("name", PARTS)
def test_every_plan_on_four_ranks_computes_what_one_process_computes(ranks: RankPools, name: str) -> None:
    blocks = [Plan(tp=2, zero=zero, blocks=("Residual",)) for zero in (1, 2, 3)]
    hold(ranks, 4, case_of(name), [*FOUR, *blocks])


@pytest.mark.matrix
def test_copies_of_shards_of_pieces_compute_what_one_process_computes(ranks: RankPools) -> None:
    hold(ranks, 8, case_of("grouped"), [Plan(tp=2, zero=zero, dp_replicate=2) for zero in (1, 2, 3)])


def of_one_process(case: Case, plans: Sequence[Plan]) -> list[Trace]:
    """On one rank of the pool."""
    found = []
    for plan in plans:
        with Mesh.from_env() as mesh:
            found.append(trace(case, Plan(precision=plan.precision), mesh))
    return found


DROPOUT = [Plan(tp=2), Plan(tp=2, recompute="blocks"), Plan(tp=2, recompute="selective"), Plan(tp=2, zero=3)]


@pytest.mark.parametrize("name", ["separate", pytest.param("perceptron", marks=pytest.mark.matrix)])
def test_dropout_masks_are_those_of_one_process(ranks: RankPools, name: str) -> None:
    case = case_of(name, dropout=0.3)
    expected = ranks(1, of_one_process, case, DROPOUT)[0]
    for plan, alone, found in zip(DROPOUT, expected, ranks(2, traces, case, DROPOUT)[0], strict=True):
        verdict = compare(alone, found, "fp32")
        assert verdict.holds, f"{plan}: {verdict}"


NARROW = [Plan(tp=2, precision="bf16"), Plan(tp=2, precision="bf16", zero=3), Plan(tp=2, precision="fp16", zero=2)]


@pytest.mark.parametrize("name", ["grouped", pytest.param("inline", marks=pytest.mark.matrix)])
def test_narrow_precisions_compute_what_one_process_computes_in_them(ranks: RankPools, name: str) -> None:
    case = case_of(name)
    expected = ranks(1, of_one_process, case, NARROW)[0]
    for plan, alone, found in zip(NARROW, expected, ranks(2, traces, case, NARROW)[0], strict=True):
        verdict = compare(alone, found, plan.precision)
        assert verdict.holds, f"{plan}: {verdict}"


def a_copy_comes_apart(name: str) -> str:
    with Mesh.from_env(Plan(tp=2)) as mesh:
        torch.manual_seed(0)
        model = parallelize(build("perceptron"), mesh, Plan(tp=2))
        check_replicas(model)
        if mesh.rank == 1:
            parameter = dict(model.named_parameters())[name]
            (parameter.to_local() if isinstance(parameter, DTensor) else parameter).data.add_(1e-3)
        try:
            check_replicas(model)
        except ReplicasDiffer as exc:
            return str(exc)
        return ""


@pytest.mark.parametrize("name", ["head.weight", "blocks.0.parts.0.down.bias"])
def test_copies_on_ranks_that_share_layers_are_compared(ranks: RankPools, name: str) -> None:
    for told in ranks(2, a_copy_comes_apart, name):
        assert told.startswith(f"Parameter {name} differs between rank 0 and rank 1.")


def test_pieces_of_one_parameter_may_differ(ranks: RankPools) -> None:
    assert ranks(2, a_copy_comes_apart, "blocks.0.parts.0.up.weight") == ["", ""]


def optimizers() -> list[str]:
    told = []
    with Mesh.from_env(Plan(tp=2)) as mesh:
        for kind in (torch.optim.Adafactor, torch.optim.Rprop):
            model = parallelize(build("perceptron"), mesh, Plan(tp=2))
            try:
                NativeEngine(model, kind(model.parameters()), loss)
            except PlanError as exc:
                told.append(str(exc))
    return told


def test_optimizers_that_look_at_whole_tensors_are_refused(ranks: RankPools) -> None:
    first, second = ranks(2, optimizers)[0]
    assert "Adafactor does not work on shards (plan.zero=0, plan.tp=2)" in first
    assert "Use RMSprop, or set plan.zero=0 and plan.tp=1." in second


def test_a_plan_that_compiles_split_layers_is_refused() -> None:
    with pytest.raises(PlanError, match=r"plan\.compile is set with plan\.tp = 2"):
        Plan(tp=2, compile=True)
    assert Plan(tp=2, zero=3).data_ranks(8) == 4
