"""Experts that are dealt out: models compute what one process computes, gradients, norms and steps too."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import hold, plain_trace, traces, whole
from rank_pool import RankPools
from torch import Tensor, nn

from trainfleet.checkpoint import Checkpointer
from trainfleet.errors import PlanError, ReplicasDiffer
from trainfleet.loss import LossSum
from trainfleet.mesh import Mesh
from trainfleet.parallel import make_engine, parallelize
from trainfleet.parallel.experts.apply import find_experts, is_expert
from trainfleet.parallel.experts.layer import Experts, MixtureOfExperts, balance_loss
from trainfleet.parallel.replicas import check_replicas
from trainfleet.plan import Plan
from trainfleet.store import FileStore
from trainfleet.training.proof.case import Case
from trainfleet.training.proof.verdict import compare

VOCABULARY, WIDTH = 16, 8


class Block(nn.Module):
    def __init__(self, capacity_factor: float | None, top_k: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mixture = MixtureOfExperts(WIDTH, 6, 4, top_k=top_k, capacity_factor=capacity_factor)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixture(self.norm(x))


class Model(nn.Module):
    """Tokens [B, T] to (logits, balance loss)."""

    def __init__(self, capacity_factor: float | None = None, top_k: int = 2) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block(capacity_factor, top_k) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.tokens(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x), balance_loss(self)


def tokens(number: int) -> dict[str, Tensor]:
    """Of other lengths each; of number 2 all alike, so that most experts get none of them."""
    generator = torch.Generator().manual_seed(number)
    length = 3 + number % 3
    row = torch.randint(VOCABULARY, (2, length + 1), generator=generator)
    if number % 4 == 2:
        row = torch.full_like(row, 3)
    return {"input": row[:, :-1], "target": row[:, 1:]}


def loss(output: tuple[Tensor, Tensor], batch: dict[str, Tensor]) -> LossSum:
    logits, balance = output
    total = F.cross_entropy(logits.flatten(0, 1), batch["target"].flatten(), reduction="sum")
    return LossSum(total + 0.1 * balance * batch["target"].numel(), batch["target"].numel())


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.1, eps=1e-3)


def case_of(capacity_factor: float | None = None) -> Case:
    return Case(
        build=functools.partial(Model, capacity_factor),
        loss_fn=loss,
        micro_batch=tokens,
        optimizer=adamw,
        steps=3,
        accumulation=2,
        clip_norm=0.5,
    )


def test_two_ranks_compute_what_one_process_computes(ranks: RankPools) -> None:
    hold(ranks, 2, case_of(), [Plan(ep=2), Plan(ep=2, zero=3, recompute="blocks")])
    hold(ranks, 2, case_of(0.8), [Plan(ep=2)])


def alike(number: int) -> dict[str, Tensor]:
    """After the first step, only one token: each block then sends all of them to one expert."""
    row = tokens(number)
    return {key: value if number < 2 else torch.full_like(value, 3) for key, value in row.items()}


def test_experts_that_got_no_token_in_a_step_go_on_as_those_of_one_process_do(ranks: RankPools) -> None:
    case = replace(case_of(), build=functools.partial(Model, None, 1), micro_batch=alike, accumulation=1)
    hold(ranks, 2, case, [Plan(ep=2)])


@pytest.mark.parametrize("degree", [2, pytest.param(4, marks=pytest.mark.matrix)])
def test_four_ranks_hold_experts_once_or_twice(ranks: RankPools, degree: int) -> None:
    hold(ranks, 4, case_of(), [Plan(ep=degree), Plan(ep=degree, zero=2, dp_replicate=2)])


@pytest.mark.matrix
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_every_stage_computes_what_one_process_computes(ranks: RankPools, zero: int) -> None:
    plans = [Plan(ep=2, zero=zero), Plan(ep=4, zero=zero, recompute="selective"), Plan(ep=4, zero=zero)]
    hold(ranks, 4, case_of(1.0), plans)


def even_tokens(number: int) -> dict[str, Tensor]:
    """Of lengths that two ranks divide; of number 2 all alike."""
    draw = torch.Generator().manual_seed(number)
    row = torch.randint(VOCABULARY, (2, 5 + number % 2 * 2), generator=draw)
    row = torch.full_like(row, 3) if number % 4 == 2 else row
    return {"input": row[:, :-1], "target": row[:, 1:]}


def test_tokens_of_sequences_in_pieces_travel_to_their_experts(ranks: RankPools) -> None:
    hold(ranks, 2, replace(case_of(0.8), micro_batch=even_tokens), [Plan(cp=2, ep=2), Plan(cp=2, ep=2, zero=3)])


@pytest.mark.matrix
@pytest.mark.parametrize("zero", [0, 2, 3])
@pytest.mark.parametrize("degree", [2, 4])
def test_experts_lie_over_ranks_of_data_and_of_pieces(ranks: RankPools, degree: int, zero: Any) -> None:
    plan = Plan(cp=2, ep=degree, zero=zero, recompute="blocks" if degree == 2 else "none")
    hold(ranks, 4, replace(case_of(), micro_batch=even_tokens), [plan])
    one_expert = replace(case_of(), build=functools.partial(Model, None, 1), micro_batch=alike_pieces, accumulation=1)
    hold(ranks, 4, one_expert, [plan])


def alike_pieces(number: int) -> dict[str, Tensor]:
    """After the first step, only one token: ranks that have other experts get none."""
    row = even_tokens(number)
    return {key: value if number < 2 else torch.full_like(value, 3) for key, value in row.items()}


class Staged(Model):
    """Stages hand on tensors alone, so the loss does without `balance_loss`."""

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.tokens(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x), x.new_zeros(())


def test_the_experts_of_each_stage_are_dealt_out_over_the_ranks_of_its_data(ranks: RankPools) -> None:
    """The first stage has none."""
    plans = [Plan(pp=2, ep=2, stages=("blocks.0",)), Plan(pp=2, ep=2, zero=2)]
    hold(ranks, 4, replace(case_of(1.0), build=functools.partial(Staged, 1.0)), plans)


@pytest.mark.matrix
@pytest.mark.parametrize("more", [{"tp": 2}, {"cp": 2}, {"zero": 3, "recompute": "blocks"}, {"zero": 1}], ids=str)
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved_zero_bubble"])
def test_experts_in_stages_go_with_all_else(ranks: RankPools, schedule: Any, more: Any) -> None:
    build = StagedPerceptron if "tp" in more else functools.partial(Staged, None)
    plan = Plan(pp=2, ep=2, schedule=schedule, **more)
    size = 8 if {"tp", "cp"} & set(more) else 4
    hold(ranks, size, replace(case_of(), build=build, micro_batch=even_tokens), [plan])


class WithPerceptron(Model):
    def __init__(self) -> None:
        super().__init__()
        self.perceptron = nn.Sequential(nn.Linear(WIDTH, 12), nn.GELU(), nn.Linear(12, WIDTH))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.perceptron(self.tokens(tokens))
        for block in self.blocks:
            x = block(x)
        return self.head(x), balance_loss(self)


@pytest.mark.matrix
def test_split_layers_beside_experts_that_are_dealt_out(ranks: RankPools) -> None:
    case = replace(case_of(), build=WithPerceptron)
    expected = plain_trace(case, 2)
    plans = [Plan(ep=2, tp=2), Plan(ep=2, tp=2, zero=3)]
    for plan, each in zip(plans, ranks(4, traces, case, plans)[0], strict=True):
        verdict = compare(expected, each, "fp32")
        assert verdict.holds, f"{plan}: {verdict}"


class StagedPerceptron(WithPerceptron):
    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.perceptron(self.tokens(tokens))
        for block in self.blocks:
            x = block(x)
        return self.head(x), x.new_zeros(())


class Run:
    def __init__(self, plan: Plan, mesh: Mesh, folder: str) -> None:
        torch.manual_seed(0)
        self.mesh = mesh
        self.model = parallelize(StagedPerceptron(), mesh, plan, example=even_tokens(0))
        self.engine = make_engine(self.model, adamw(self.model), loss)
        self.checkpointer = Checkpointer(FileStore(folder), group=mesh.world)

    def step(self) -> None:
        data = self.mesh.data_axes
        self.engine.forward_backward([even_tokens(i) for i in range(data.rank, 4, data.size)])
        self.engine.step()

    def numbers(self) -> dict[str, Any]:
        found = {name: whole(parameter).numpy() for name, parameter in self.model.named_parameters()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.engine.optimizer.state[parameter].items():  # type: ignore[attr-defined]
                found[f"{name}.{key}"] = whole(value).numpy()
        return found


def saved(plan: Plan, folder: str) -> dict[str, Any]:
    with Mesh.from_env(plan) as mesh:
        run = Run(plan, mesh, folder)
        run.step()
        run.step()
        check_replicas(run.model)
        run.checkpointer.save(2, **run.engine.state())
        run.checkpointer.close()
        return run.numbers()


def loaded(plan: Plan, folder: str) -> dict[str, Any]:
    with Mesh.from_env(plan) as mesh:
        run = Run(plan, mesh, folder)
        assert run.checkpointer.restore(**run.engine.state()) == 2
        found = run.numbers()
        run.step()
        return found


WAYS = [
    (4, Plan(ep=2, tp=2), 2, Plan(ep=2)),
    (4, Plan(ep=2), 1, Plan()),
    (1, Plan(), 2, Plan(ep=2, zero=2)),
    (2, Plan(ep=2, zero=1), 4, Plan(ep=4)),
    (4, Plan(ep=4, cp=2), 1, Plan()),
    (4, Plan(ep=2, pp=2), 2, Plan(ep=2)),
    (4, Plan(ep=2, cp=2, zero=2), 4, Plan(ep=2, pp=2, zero=3)),
    (1, Plan(), 8, Plan(ep=2, cp=2, pp=2)),
]


@pytest.mark.parametrize(
    "way", [WAYS[1], *(pytest.param(way, marks=pytest.mark.matrix) for way in (WAYS[0], *WAYS[2:]))]
)
def test_saved_under_one_plan_experts_load_under_another_to_the_bit(ranks: RankPools, tmp_path: Any, way: Any) -> None:
    size, plan, other_size, other = way
    expected: dict[str, Any] = {}
    for part in ranks(size, saved, plan, str(tmp_path)):  # of a stage
        expected |= part
    seen: set[str] = set()
    for found in ranks(other_size, loaded, other, str(tmp_path)):
        seen |= set(found)
        assert [name for name in found if not np.array_equal(found[name], expected[name])] == []
    assert seen == set(expected)


def memory_and_replicas() -> list[Any]:
    with Mesh.from_env(Plan(ep=2)) as mesh:
        torch.manual_seed(0)
        model = parallelize(Model(), mesh, Plan(ep=2))
        experts = [p for p in model.parameters() if is_expert(p)]
        held = sum(p.to_local().untyped_storage().nbytes() for p in experts) / sum(4 * p.numel() for p in experts)
        check_replicas(model)
        if mesh.rank == 3:
            experts[0].to_local().data.add_(1e-3)
        try:
            check_replicas(model)
        except ReplicasDiffer as exc:
            return [held, str(exc)]
        return [held, ""]


def test_each_rank_keeps_its_part_and_copies_that_come_apart_are_found(ranks: RankPools) -> None:
    for held, said in ranks(4, memory_and_replicas):
        assert held == 0.5
        assert "blocks.0.mixture.experts" in said


class OfThree(nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.layer = MixtureOfExperts(4, 4, number, top_k=1)


def refused(number: int) -> str:
    with Mesh.from_env(Plan(ep=2)) as mesh, pytest.raises(PlanError) as caught:
        parallelize(OfThree(number) if number else nn.Linear(3, 3), mesh, Plan(ep=2))
    return str(caught.value)


def test_what_cannot_be_dealt_out_is_refused(ranks: RankPools) -> None:
    assert "plan.ep=2 does not divide the 3 experts of layer.experts. Use one of 1, 3" in ranks(2, refused, 3)[0]
    assert "Linear has no experts" in ranks(2, refused, 0)[0]
    with pytest.raises(PlanError, match=r"plan\.ep=3 does not divide"):
        Plan(ep=3).for_world(4)


def mixtral() -> Any:
    import transformers

    config = transformers.MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        output_router_logits=True,
        max_position_embeddings=32,
        router_aux_loss_coef=0.1,
    )
    return transformers.MixtralForCausalLM(config)


def labelled(number: int) -> dict[str, Tensor]:
    row = torch.randint(VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(number))
    return {"input_ids": row, "labels": row}


def own_loss(output: Any, batch: Any) -> Any:
    return output.loss


@pytest.mark.matrix
def test_mixtral_of_transformers_computes_what_it_computes_in_one_process(ranks: RankPools) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    case = Case(build=mixtral, loss_fn=own_loss, micro_batch=labelled, optimizer=adamw, steps=2)
    hold(ranks, 2, case, [Plan(ep=2), Plan(ep=2, zero=2)])
    assert list(find_experts(mixtral())) == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    assert find_experts(Experts(2, 2, 2))
