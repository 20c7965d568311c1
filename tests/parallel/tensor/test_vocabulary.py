"""A vocabulary in pieces gives the losses, gradients and parameters of one process, and logits are never gathered."""

from __future__ import annotations

import functools
import itertools
import logging
from collections import OrderedDict
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cluster.test_pipelines import check
from oracle import hold, traces
from rank_pool import RankPools
from split_models import Model, adamw, build, tokens
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils._python_dispatch import TorchDispatchMode

from trainfleet.errors import PlanError
from trainfleet.loss import LossSum
from trainfleet.mesh import Mesh
from trainfleet.parallel import NativeEngine, make_engine, parallelize
from trainfleet.parallel.spread import spread_of
from trainfleet.parallel.tensor.find import find_regions
from trainfleet.parallel.tensor.vocabulary import split_cross_entropy, split_embedding, vocabulary_regions
from trainfleet.plan import Plan
from trainfleet.training.proof.case import Case
from trainfleet.training.proof.trace import trace
from trainfleet.training.proof.verdict import compare

V = 8


def whole(function: Any, *args: Any, **kwargs: Any) -> Any:
    raise AssertionError("computed whole")


def losses() -> list[tuple[str, Tensor, Tensor, Tensor, Tensor]]:
    """(what, loss and gradient of the whole, those of pieces)."""
    found = []
    with Mesh.from_env(Plan(tp=2)) as mesh:
        axis = mesh.torch["tp"]
        generator = torch.Generator().manual_seed(0)
        weight = torch.rand(V, generator=generator)
        for shape, reduction, smoothing, weighted, dtype in itertools.product(
            [(5, V), (3, V, 2), (V,)],
            ["none", "sum", "mean"],
            [0.0, 0.2],
            [False, True],
            [torch.float32, torch.float64, torch.bfloat16],
        ):
            if smoothing and weighted:
                continue
            logits = (20 * torch.randn(shape, generator=generator)).to(dtype)
            dim = 1 if len(shape) > 1 else 0
            target = torch.randint(V, (*shape[:dim], *shape[dim + 1 :]), generator=generator)
            if len(shape) > 1:
                target.view(-1)[1] = -100
            options = {"reduction": reduction, "label_smoothing": smoothing}
            by = weight.to(dtype) if weighted else None
            alone = logits.clone().requires_grad_()
            expected = F.cross_entropy(alone, target, by, **options)
            expected.float().square().sum().backward()
            piece = logits.chunk(2, dim)[mesh["tp"].rank].clone().requires_grad_()
            args = [None if each is None else DTensor.from_local(each, axis, [Replicate()]) for each in (target, by)]
            split = DTensor.from_local(piece, axis, [Shard(dim)])
            loss = split_cross_entropy(axis, functools.partial(whole, None), split, *args, **options)
            assert loss.dtype == expected.dtype
            loss.float().square().sum().backward()
            wanted = alone.grad.chunk(2, dim)[mesh["tp"].rank]
            what = f"{shape} {reduction} {smoothing} {weighted} {dtype}"
            found.append((what, expected.detach(), wanted, loss.detach(), piece.grad))
    return found


def test_the_loss_of_logits_in_pieces_is_that_of_the_whole(ranks: RankPools) -> None:
    for found in ranks(2, losses):
        assert len(found) == 81
        for what, expected, wanted, loss, gradient in found:
            rounding = 1e-2 if "bfloat16" in what else 1e-6
            for one, other in ((expected, loss), (wanted, gradient)):
                around = rounding * max(1.0, float(one.abs().max()))
                assert torch.allclose(other, one, rtol=rounding, atol=around), f"{what}: {other}, not {one}"


def lookups() -> None:
    with Mesh.from_env(Plan(tp=2)) as mesh:
        axis = mesh.torch["tp"]
        torch.manual_seed(0)
        table, indices = torch.randn(V, 3), torch.tensor([[0, 7, 3], [4, 4, 2]])
        for padding in (None, 4, -1):
            alone = table.clone().requires_grad_()
            expected = F.embedding(indices, alone, padding)
            expected.square().sum().backward()
            piece = table.chunk(2)[mesh["tp"].rank].clone().requires_grad_()
            given = DTensor.from_local(indices, axis, [Replicate()]), DTensor.from_local(piece, axis, [Shard(0)])
            found = split_embedding(axis, functools.partial(whole, None), *given, padding)
            torch.testing.assert_close(found.to_local(), expected, rtol=0, atol=0)
            found.square().sum().backward()
            torch.testing.assert_close(piece.grad, alone.grad.chunk(2)[mesh["tp"].rank], rtol=0, atol=0)
        for option in ({"scale_grad_by_freq": True}, {"max_norm": 1.0}, {"sparse": True}):
            with pytest.raises(AssertionError, match="computed whole"):
                split_embedding(axis, functools.partial(whole, None), *given, **option)


def test_embeddings_in_pieces_are_those_of_the_whole_to_the_bit(ranks: RankPools) -> None:
    ranks(2, lookups)


def model_of(tied: bool) -> Model:
    model = build("perceptron")
    if tied:
        nn.init.normal_(model.tokens.weight, std=0.3)
        model.head.weight = model.tokens.weight
    return model


def plain_loss(output: Tensor, batch: dict[str, Tensor]) -> LossSum:
    target = batch["target"].clone()
    target[0, 0] = -100
    total = F.cross_entropy(output.flatten(0, 1), target.flatten(), reduction="sum")
    return LossSum(total, (target != -100).sum())


def by_hand(output: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """No function here knows of pieces."""
    right = (output.argmax(-1) == batch["target"]).float().mean()
    assert 0 <= right.item() <= 1
    log_probabilities = output[:, 1:].log_softmax(-1)
    at_target = log_probabilities.gather(-1, batch["target"][:, 1:, None])
    return -at_target.mean() + 1e-2 * output.logsumexp(-1).square().mean()


def weighted(output: Tensor, batch: dict[str, Tensor]) -> Tensor:
    by = torch.linspace(0.5, 2, output.shape[-1])
    return F.cross_entropy(output.flatten(0, 1), batch["target"].flatten(), by)


def unflattened(output: Tensor, batch: dict[str, Tensor]) -> Tensor:
    target = batch["target"].where(batch["input"] != 3, -100)
    each = F.cross_entropy(output.transpose(1, 2), target, reduction="none", label_smoothing=0.1)
    return each.sum() / (target != -100).sum()


def case_of(tied: bool, loss: Any = plain_loss) -> Case:
    return Case(
        build=functools.partial(model_of, tied),
        loss_fn=loss,
        micro_batch=tokens,
        optimizer=adamw,
        steps=2,
        accumulation=2,
        clip_norm=0.5,
    )


SPLIT = [Plan(tp=2, tp_vocabulary=True, zero=zero) for zero in (0, 1, 2, 3)]


@pytest.mark.parametrize("tied", [False, True])
def test_two_ranks_compute_what_one_process_computes(ranks: RankPools, tied: bool) -> None:
    hold(ranks, 2, case_of(tied), SPLIT)


def test_a_loss_written_by_hand_is_right_too(ranks: RankPools) -> None:
    hold(ranks, 2, case_of(True, by_hand), SPLIT[::3])


@pytest.mark.matrix
@pytest.mark.parametrize("tied", [False, True])
def test_four_ranks_compute_what_one_process_computes(ranks: RankPools, tied: bool) -> None:
    hold(ranks, 4, case_of(tied), [*SPLIT, Plan(tp=4, tp_vocabulary=True)])


STAGED = [
    Plan(tp=2, pp=2, tp_vocabulary=True),
    Plan(tp=2, pp=2, tp_vocabulary=True, schedule="zbv", microbatches=2),
    Plan(tp=2, pp=2, tp_vocabulary=True, recompute="blocks", schedule="looped_bfs"),
]


@pytest.mark.parametrize(
    ("tied", "plan"),
    [(True, STAGED[0]), *(pytest.param(i % 2 == 0, STAGED[i % 3], marks=pytest.mark.matrix) for i in range(1, 6))],
)
def test_stages_leave_logits_in_pieces_for_the_loss(ranks: RankPools, tied: bool, plan: Plan) -> None:
    check(ranks, 4, case_of(tied), plan)


@pytest.mark.matrix
def test_stages_take_a_loss_written_by_hand_and_shard_what_is_left(ranks: RankPools) -> None:
    check(ranks, 4, case_of(True, by_hand), STAGED[0])
    for more in ({"zero": 1}, {"zero": 3}, {"cp": 2}):
        check(ranks, 8, case_of(True), Plan(tp=2, pp=2, tp_vocabulary=True, **more))


def ending_in_a_norm() -> nn.Module:
    return nn.Sequential(OrderedDict(model=build("perceptron"), last=nn.LayerNorm(16)))


@pytest.mark.matrix
def test_logits_that_go_to_another_stage_are_whole_on_the_way(ranks: RankPools) -> None:
    case = replace(case_of(False), build=ending_in_a_norm)
    for more in ({}, {"cp": 2}):
        size = 4 * more.get("cp", 1)
        check(ranks, size, case, Plan(tp=2, pp=2, tp_vocabulary=True, stages=("last",), **more))


IN_PIECES = [
    Plan(tp=2, cp=2, tp_vocabulary=True),
    Plan(tp=2, cp=2, tp_vocabulary=True, recompute="blocks"),
    Plan(tp=2, cp=2, tp_vocabulary=True, zero=3),
]


def test_sequences_in_pieces_go_with_logits_in_pieces(ranks: RankPools) -> None:
    hold(ranks, 4, case_of(True), IN_PIECES[:1])


@pytest.mark.matrix
@pytest.mark.parametrize("tied", [False, True])
def test_sequences_in_pieces_take_every_loss(ranks: RankPools, tied: bool) -> None:
    hold(ranks, 4, case_of(tied), IN_PIECES)
    for loss in (by_hand, weighted, unflattened):
        hold(ranks, 4, case_of(tied, loss), IN_PIECES[:1])


class Said(logging.Handler):
    """The names of functions that are computed whole while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        if "computed" in record.msg:
            self.names.add(str(record.args[0]))


def lain(plan: Plan) -> tuple[list[str], bool, set[str]]:
    """How the logits of a step and of an evaluation lie where the loss is, whether a call gives them in pieces too,
    and what was computed whole."""
    seen: list[str] = []
    logger, said = logging.getLogger("trainfleet.parallel"), Said()
    logger.setLevel(logging.INFO)
    logger.addHandler(said)

    def loss(output: Tensor, batch: dict[str, Tensor]) -> Any:
        seen.append(str(output.placements) if isinstance(output, DTensor) else "whole")
        return plain_loss(output, batch)

    with Mesh.from_env(plan) as mesh:
        torch.manual_seed(0)
        model = parallelize(model_of(True), mesh, plan, example=tokens(0))
        engine = make_engine(model, adamw(model), loss)
        engine.forward_backward([tokens(0)])
        engine.evaluate([tokens(1)])
        logger.removeHandler(said)
        return seen, isinstance(model(tokens(0)["input"]), DTensor), said.names


def test_only_the_last_stage_has_logits_and_they_are_in_pieces(ranks: RankPools) -> None:
    found = ranks(4, lain, STAGED[0])
    assert [seen for seen, *_ in found] == [[], [], ["(Shard(dim=2),)"] * 2, ["(Shard(dim=2),)"] * 2]
    assert not any(is_split or whole for _, is_split, whole in found)


def test_logits_lie_in_pieces_of_sequences_and_of_tokens_and_nothing_is_computed_whole(ranks: RankPools) -> None:
    for seen, is_split, whole in ranks(4, lain, IN_PIECES[0]):
        assert seen == ["(Shard(dim=1), Shard(dim=2))"] * 2 and not is_split and not whole


def alone_in_bf16(case: Case) -> Any:
    with Mesh.from_env() as mesh:
        return trace(case, Plan(precision="bf16"), mesh)


def test_bf16_computes_what_one_process_computes_in_it(ranks: RankPools) -> None:
    case, plan = case_of(True), Plan(tp=2, tp_vocabulary=True, precision="bf16")
    verdict = compare(ranks(1, alone_in_bf16, case)[0], ranks(2, traces, case, [plan])[0][0], "bf16")
    assert verdict.holds, str(verdict)


class Exchanges(TorchDispatchMode):
    """The names of the exchanges that DTensors make while it is entered; the engine's own checks gather too."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented
        if "_c10d_functional" in str(func):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def exchanges(vocabulary: bool, by_function: bool) -> tuple[int, int, str, bool]:
    plan = Plan(tp=2, tp_vocabulary=vocabulary, tp_whole=() if vocabulary else ("head",))
    seen: list[str] = []

    def loss(output: Tensor, batch: dict[str, Tensor]) -> Tensor:
        seen.append(str(output.placements) if isinstance(output, DTensor) else "whole")
        return (
            F.cross_entropy(output.flatten(0, 1), batch["target"].flatten()) if by_function else by_hand(output, batch)
        )

    with Mesh.from_env(plan) as mesh:
        torch.manual_seed(0)
        model = parallelize(model_of(True), mesh, plan)
        engine = NativeEngine(model, adamw(model), loss)
        with Exchanges() as made:
            engine.forward_backward([tokens(0)])
        gathered = sum("gather" in name for name in made.names)
        assert any("reduce" in name for name in made.names)
        outside = model(tokens(0)["input"])
        held = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in model.parameters())
        assert str(spread_of(model).split).count("plan.tp_vocabulary") == vocabulary
        return gathered, held, seen[0], isinstance(outside, DTensor)


def test_logits_are_never_gathered_and_a_call_outside_of_a_step_gives_them_whole(ranks: RankPools) -> None:
    (gathered, held, seen, is_split), *_ = ranks(2, exchanges, True, True)
    _, held_whole, seen_whole, _ = ranks(2, exchanges, False, True)[0]
    assert ranks(2, exchanges, True, False)[0][0] > 0  # of another loss they are
    assert gathered == 0 and "Shard(dim=2)" in seen and not is_split
    assert seen_whole == "whole" and held_whole - held == 16 * 16 // 2


def regions_of(model: nn.Module, size: int = 2) -> list[str]:
    return [region.name for region in vocabulary_regions(model, size, find_regions(model, size), set())]


def test_heads_and_their_embeddings_are_found_and_others_are_not():
    model = build("separate")  # its attention has layers as wide as the vocabulary
    model.positions = nn.Embedding(6, 16)
    assert regions_of(model) == ["tokens", "head"]
    model.tokens.max_norm = 1.0
    with pytest.raises(PlanError, match=r"plan\.tp_vocabulary is set, but Model has no linear layer"):
        regions_of(model)


def test_what_cannot_be_split_is_refused_with_the_name():
    model = build("perceptron")
    model.tokens, model.head = nn.Embedding(17, 16), nn.Linear(16, 17)
    with pytest.raises(PlanError, match=r"plan\.tp=2 does not divide the vocabulary of 17 tokens of tokens"):
        regions_of(model)
    model = build("perceptron")
    model.other = nn.Module()
    model.other.weight = model.head.weight
    with pytest.raises(PlanError, match=r"splits head, which shares a parameter with other"):
        regions_of(model)


def llama() -> nn.Module:
    """Its loss is computed in its forward, from the labels."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config)


def labelled(number: int) -> dict[str, Tensor]:
    batch = tokens(number)
    return {"input_ids": batch["input"], "labels": batch["target"]}


def loss_of_model(output: Any, batch: dict[str, Tensor]) -> Tensor:
    return output.loss


def test_a_model_of_transformers_that_computes_its_loss_itself_is_right(ranks: RankPools) -> None:
    pytest.importorskip("transformers")
    case = Case(build=llama, loss_fn=loss_of_model, micro_batch=labelled, optimizer=adamw, steps=2, clip_norm=0.5)
    hold(ranks, 2, case, SPLIT[::3])
