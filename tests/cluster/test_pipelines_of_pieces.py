"""Stages whose sequences are in pieces, or whose experts are dealt out, compute what one process computes."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from cluster.test_pipelines import case_of, check, micro_batch  # noqa: E402
from models import MODELS  # noqa: E402
from rank_pool import RankPools  # noqa: E402

from trainfleet.errors import DataError  # noqa: E402
from trainfleet.mesh import Mesh  # noqa: E402
from trainfleet.parallel import make_engine, parallelize  # noqa: E402
from trainfleet.plan import Plan  # noqa: E402

SCHEDULES = ("gpipe", "1f1b", "interleaved_1f1b", "looped_bfs", "interleaved_zero_bubble", "zbv", "dualpipev")
ATTENTION = ("ring", "all_to_all")


def test_stages_hand_on_pieces_of_sequences(ranks: RankPools) -> None:
    check(ranks, 4, case_of("transformer", 2), Plan(pp=2, cp=2, recompute="blocks"))


@pytest.mark.matrix
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_takes_pieces_of_sequences(ranks: RankPools, schedule: Any) -> None:
    check(ranks, 4, case_of("transformer", dropout=0.2, depth=4), Plan(pp=2, cp=2, schedule=schedule))


@pytest.mark.matrix
@pytest.mark.parametrize("kind", ATTENTION)
@pytest.mark.parametrize(
    "more",
    [
        {"recompute": "selective"},
        {"precision": "bf16"},
        {"precision": "fp16", "recompute": "blocks"},
        {"microbatches": 2},
        {"zero": 1},
        {"zero": 2, "blocks": ("blocks.*",)},
        {"zero": 3, "recompute": "blocks"},
    ],
    ids=str,
)
def test_pieces_go_with_whatever_stages_go_with(ranks: RankPools, more: Any, kind: Any) -> None:
    check(ranks, 4, case_of("transformer", depth=4), Plan(pp=2, cp=2, cp_attention=kind, **more))


@pytest.mark.matrix
@pytest.mark.parametrize("kind", ATTENTION)
@pytest.mark.parametrize(
    "more", [{"tp": 2}, {"tp": 2, "recompute": "blocks"}, {"dp_replicate": 2}, {"zero": 3, "dp_shard": 2}], ids=str
)
def test_eight_ranks_split_in_three_ways(ranks: RankPools, more: Any, kind: Any) -> None:
    if kind == "all_to_all" and "tp" in more:
        pytest.skip("the model has two heads")
    check(ranks, 8, case_of("transformer", depth=4), Plan(pp=2, cp=2, cp_attention=kind, **more))


@pytest.mark.matrix
def test_a_tied_embedding_at_both_ends_gets_the_gradients_of_all_pieces(ranks: RankPools) -> None:
    """Its layers are recurrent: they are computed on the whole by each rank."""
    even = replace(case_of("recurrent"), micro_batch=functools.partial(micro_batch, "transformer"))
    check(ranks, 4, even, Plan(pp=2, cp=2))


def evaluated(plan: Plan) -> list[Any]:
    """Evaluation of sequences that can be split and others, calls of the model, and what training refuses."""
    case = MODELS["transformer"]
    torch.set_num_threads(1)
    with Mesh.from_env(plan) as mesh:
        batches = [case.micro_batch(0, i) for i in range(4)]
        batches[2] = {key: value[:, :5] for key, value in batches[2].items()}
        model = parallelize(case.build(0), mesh, plan, example=batches[0])
        engine = make_engine(model, torch.optim.SGD(model.parameters(), lr=0.1), case.loss_fn)
        found: list[Any] = []
        loss = engine.evaluate(iter(batches))
        found += [loss.total, loss.weight]
        model.eval()
        found += [model(batch["input"]) for batch in batches]
        if plan.cp > 1:
            with pytest.raises(DataError, match=r"plan\.cp=2 does not divide the 5 positions"):
                engine.forward_backward(batches)
        return found


def test_evaluation_and_calls_give_what_one_process_gives(ranks: RankPools) -> None:
    expected = ranks(1, evaluated, Plan())[0]
    for found in ranks(4, evaluated, Plan(pp=2, cp=2)):
        for one, other in zip(expected, found, strict=True):
            torch.testing.assert_close(torch.as_tensor(other), torch.as_tensor(one), rtol=1e-5, atol=1e-5)
