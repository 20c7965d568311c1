"""Sequences in pieces: models compute what one process computes, gradients and steps too, in any combination."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import MODELS
from oracle import hold, traces, whole
from rank_pool import RankPools
from split_models import LENGTH, PARTS, adamw, build, loss, tokens
from torch import Tensor, nn

from trainfleet.errors import DataError, PlanError
from trainfleet.loss import LossSum
from trainfleet.mesh import Mesh
from trainfleet.parallel import make_engine, parallelize
from trainfleet.parallel.replicas import check_replicas
from trainfleet.plan import Plan
from trainfleet.training.proof.case import Case
from trainfleet.training.proof.trace import trace
from trainfleet.training.proof.verdict import Trace, compare


def case_of(name: str, dropout: float = 0.0) -> Case:
    build_it = functools.partial(build, name, dropout) if name in PARTS else functools.partial(MODELS[name].build, 0)
    return Case(
        build=build_it,
        loss_fn=loss if name in PARTS else MODELS[name].loss_fn,
        micro_batch=tokens if name in PARTS else functools.partial(MODELS[name].micro_batch, 0),
        optimizer=adamw,
        steps=2,
        accumulation=2,
        clip_norm=0.5,
    )


@pytest.mark.parametrize("name", ["grouped", "transformer", pytest.param("separate", marks=pytest.mark.matrix)])
def test_two_ranks_compute_what_one_process_computes(ranks: RankPools, name: str) -> None:
    hold(ranks, 2, case_of(name), [Plan(cp=2, zero=2)])


FOUR = [
    *(Plan(cp=2, zero=zero) for zero in (0, 1, 2, 3)),
    *(Plan(cp=2, dp_replicate=2, zero=zero) for zero in (1, 3)),
    *(Plan(cp=2, tp=2, zero=zero) for zero in (0, 1, 2, 3)),
    Plan(cp=2, cp_attention="all_to_all", zero=3, recompute="blocks"),
    Plan(cp=2, tp=2, zero=2, recompute="selective"),
    Plan(cp=2, tp=2, cp_attention="all_to_all"),
]


def test_four_ranks_split_sequences_and_layers(ranks: RankPools) -> None:
    case = replace(case_of("fused"), steps=1, accumulation=1)
    hold(ranks, 4, case, [Plan(cp=2, tp=2, zero=3, recompute="blocks")])


@pytest.mark.matrix
@pytest.mark.parametrize("name", [*PARTS, "transformer"])
def test_every_plan_on_four_ranks_computes_what_one_process_computes(ranks: RankPools, name: str) -> None:
    plans = [p for p in FOUR if not (p.cp_attention == "all_to_all" and name == "grouped" and p.tp > 1)]
    plans = [p for p in plans if not (p.cp_attention == "all_to_all" and name == "transformer" and p.tp > 1)]
    hold(ranks, 4, case_of(name), plans)


def of_one_process(case: Case, plans: Sequence[Plan]) -> list[Trace]:
    """On one rank of the pool."""
    found = []
    for plan in plans:
        with Mesh.from_env() as mesh:
            alone = Plan(precision=plan.precision, microbatches=plan.microbatches)
            found.append(trace(case, alone, mesh))
    return found


OTHERS = [
    Plan(cp=2, recompute="blocks"),
    Plan(cp=2, zero=3, recompute="selective", precision="bf16"),
    Plan(cp=2, zero=2, precision="fp16", cp_attention="all_to_all"),
]


@pytest.mark.parametrize("name", ["fused", pytest.param("separate", marks=pytest.mark.matrix)])
def test_masks_of_dropout_and_narrow_precisions_are_those_of_one_process(ranks: RankPools, name: str) -> None:
    case = case_of(name, dropout=0.3)
    expected = ranks(1, of_one_process, case, OTHERS)[0]
    for plan, alone, found in zip(OTHERS, expected, ranks(2, traces, case, OTHERS)[0], strict=True):
        verdict = compare(alone, found, plan.precision)
        assert verdict.holds, f"{plan}: {verdict}"


SEQUENCE = [
    Plan(tp=2, tp_sequence=True),
    Plan(tp=2, tp_sequence=True, zero=3, recompute="blocks"),
    *(Plan(tp=2, tp_sequence=True, zero=zero) for zero in (1, 2)),
    Plan(tp=2, tp_sequence=True, microbatches=2, activations="offload"),
]


def hold_alike(ranks: RankPools, case: Case, plans: Sequence[Plan]) -> None:
    """On two ranks, with the masks of dropout and the precision of the same plan in one process."""
    expected = ranks(1, of_one_process, case, plans)[0]
    for plan, alone, found in zip(plans, expected, ranks(2, traces, case, plans)[0], strict=True):
        verdict = compare(alone, found, plan.precision)
        assert verdict.holds, f"{plan}: {verdict}"


def test_between_split_layers_ranks_keep_their_positions_and_compute_the_same(ranks: RankPools) -> None:
    hold_alike(ranks, case_of("separate", dropout=0.3), SEQUENCE[:2])


@pytest.mark.matrix
@pytest.mark.parametrize("name", [*PARTS, "transformer"])
def test_every_plan_with_positions_over_tp_computes_what_one_process_computes(ranks: RankPools, name: str) -> None:
    hold(ranks, 4, case_of(name), SEQUENCE)
    narrow = [replace(SEQUENCE[0], precision="bf16"), replace(SEQUENCE[1], precision="fp16")]
    hold_alike(ranks, case_of(name, dropout=0.3 * (name in PARTS)), [*SEQUENCE, *narrow])


class Packed(nn.Module):
    """Documents in a row: their number decides who sees whom, and positions begin anew with each."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(16, 16), nn.Embedding(LENGTH, 16)
        self.qkv, self.out = nn.Linear(16, 48, bias=False), nn.Linear(16, 16, bias=False)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        documents = batch["documents"]
        starts = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
        places = torch.arange(documents.shape[1], device=documents.device)
        begins = (places * starts).cummax(1)[0]
        x = self.tokens(batch["input"]) + self.positions(places - begins)
        allowed = (documents[:, :, None] == documents[:, None, :]) & (places[:, None] >= places)
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed[:, None])
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return F.linear(x, self.tokens.weight)  # tied


def packed(number: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(number)
    documents = (torch.rand(2, LENGTH, generator=generator) < 0.3).cumsum(1)
    row = tokens(number)
    return {"input": {"input": row["input"], "documents": documents}, "target": row["target"]}


def mean_of_kept(output: Tensor, batch: dict[str, Any]) -> LossSum:
    """Last tokens of documents have no target."""
    documents = batch["input"]["documents"]
    last = F.pad(documents[:, 1:] != documents[:, :-1], (0, 1), value=True)
    target = batch["target"].masked_fill(last, -100)
    total = F.cross_entropy(output.view(-1, 16), target.view(-1), reduction="sum")
    return LossSum(total, (target != -100).sum())


def test_packed_documents_and_tied_embeddings(ranks: RankPools) -> None:
    case = Case(build=Packed, loss_fn=mean_of_kept, micro_batch=packed, optimizer=adamw, steps=2)
    hold(ranks, 2, case, [Plan(cp=2, zero=3), Plan(cp=2, cp_attention="all_to_all"), Plan(tp=2, tp_sequence=True)])


def evaluated_and_called(plan: Plan) -> list[Any]:
    """Evaluation on splittable and other lengths, calls of the model itself, and a loop written by hand."""
    with Mesh.from_env(plan) as mesh:
        torch.manual_seed(0)
        model = parallelize(build("grouped"), mesh, plan)
        engine = make_engine(model, adamw(model), loss)
        short = {key: value[:, :5] for key, value in tokens(1).items()}
        found: list[Any] = [engine.evaluate([tokens(0), short]).total]
        with torch.no_grad():
            found += [model(tokens(0)["input"]), model(short["input"])]
        model.train()
        output = model(tokens(3)["input"])
        loss(output, tokens(3)).backward()
        found += [output.detach(), *(whole(parameter.grad) for parameter in model.parameters())]
        check_replicas(model)
        return found


def test_evaluation_calls_and_loops_by_hand_give_what_one_process_gives(ranks: RankPools) -> None:
    expected = ranks(1, evaluated_and_called, Plan())[0]
    for plan in (Plan(cp=2), Plan(cp=2, zero=3), Plan(tp=2, tp_sequence=True)):
        for found in ranks(2, evaluated_and_called, plan):
            for one, other in zip(expected, found, strict=True):
                torch.testing.assert_close(torch.as_tensor(other), torch.as_tensor(one), rtol=1e-4, atol=1e-5)


def refused(what: str) -> str:
    heads = Plan(cp=4, cp_attention="all_to_all")
    plan = heads if what == "heads" else Plan(cp=2, dp_replicate=2, zero=1)
    if what.endswith("over tp"):
        plan, what = Plan(tp=2, tp_sequence=True), what.removesuffix(" over tp")
    with Mesh.from_env(plan) as mesh:
        torch.manual_seed(0)
        try:
            if what == "batch norm":
                pair = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
                parallelize(nn.Sequential(pair, nn.BatchNorm1d(4)), mesh, plan)
            model = parallelize(build("grouped" if what == "heads" else "fused"), mesh, plan)
            engine = make_engine(model, adamw(model), loss)
            batch = tokens(0)
            if what == "heads":  # 6 tokens do not divide by 4
                batch = {key: torch.cat([value, value[:, :2]], 1) for key, value in batch.items()}
            if what == "length":
                batch = {key: value[:, :5] for key, value in batch.items()}
            if what == "no sequence":
                batch = {"input": batch["input"][:, 0], "target": batch["target"][:, 0]}
            engine.forward_backward([batch])
        except (PlanError, DataError) as exc:
            return str(exc)
    return ""


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("batch norm", "1 is a BatchNorm1d"),
        ("heads", "plan.cp=4 does not divide the 2 heads of keys and values"),
        ("length", "plan.cp=2 does not divide the 5 positions"),
        ("no sequence", "no array of the batch has two dimensions"),
        ("batch norm over tp", "Use another norm, or set plan.tp_sequence to false."),
        ("length over tp", "or set plan.tp_sequence to false"),
    ],
)
def test_what_cannot_be_split_is_refused_with_its_remedy(ranks: RankPools, what: str, said: str) -> None:
    for found in ranks(4, refused, what):
        assert said in found


def test_compiled_models_do_not_split_sequences() -> None:
    with pytest.raises(PlanError, match="compile"):
        Plan(cp=2, compile=True)
