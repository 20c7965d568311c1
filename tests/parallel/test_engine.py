"""The engine weighs by tokens, and survives what goes wrong. Against torch's own: tests/cluster/test_torch_alike.py."""

from __future__ import annotations

import functools
from collections import UserDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import hold, whole
from rank_pool import RankPools
from torch import Tensor, nn

from trainfleet.batch import call_with_batch
from trainfleet.errors import DataError, PlanError, TrainfleetError
from trainfleet.loss import LossSum
from trainfleet.mesh import Mesh
from trainfleet.parallel import NativeEngine, parallelize
from trainfleet.plan import LossScale, Plan
from trainfleet.training.proof.case import Case


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)


def bits(model: nn.Module) -> list[Tensor]:
    return [whole(parameter) for parameter in model.parameters()]


# ── weights ───────────────────────────────────────────────────────────────────────────────────────────────────────


def sometimes_weightless(index: int) -> dict[str, Tensor]:
    """Micro-batches of one to four rows; the first of all, and every third, weigh nothing."""
    generator = torch.Generator().manual_seed(index)
    x = torch.randn(1 + index % 4, 5, generator=generator)
    return {"input": x, "weight": torch.full((len(x),), float(index % 3 != 0))}


def weighted(output: Tensor, batch: dict[str, Tensor]) -> LossSum:
    return LossSum(((output.squeeze(-1) - 1).square() * batch["weight"]).sum(), batch["weight"].sum())


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))


@pytest.mark.parametrize("size", [2, 3])
def test_micro_batches_weigh_what_they_hold_and_some_nothing(ranks: RankPools, size: int) -> None:
    case = Case(build=perceptron, loss_fn=weighted, micro_batch=sometimes_weightless, optimizer=adamw, accumulation=2)
    hold(ranks, size, case, [Plan(zero=zero) for zero in (0, 1, 2, 3)])


def no_weight() -> list[Any]:
    with Mesh.from_env(Plan(zero=2)) as mesh:
        model = parallelize(perceptron(), mesh, Plan(zero=2))
        engine = NativeEngine(model, adamw(model), weighted)
        with pytest.raises(DataError, match="weight 0"):
            engine.forward_backward([sometimes_weightless(0)])
        engine.forward_backward([sometimes_weightless(1)])
        engine.step()
        evaluated = engine.evaluate([sometimes_weightless(3 * i + mesh.rank) for i in range(3)])
        at_rest = all(hasattr(parameter, "to_local") for parameter in model.parameters())
    return [evaluated.weight, evaluated.total, at_rest, engine.steps]


def test_a_step_without_weight_is_refused_and_evaluation_sums_over_ranks(ranks: RankPools) -> None:
    first, second = ranks(2, no_weight)
    assert first == second
    weight, _, at_rest, steps = first
    assert weight == sum(sometimes_weightless(3 * i + 1)["weight"].sum() for i in range(3)) and at_rest and steps == 1


# ── errors ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Fragile(nn.Module):
    """Fails where the batch says: before its second block, or in backward between the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(3))
        self.gain = nn.Parameter(torch.tensor(1.5))

    def forward(self, input: Tensor, fails: str) -> Tensor:
        x = self.blocks[0](input)
        if fails == "forward":
            raise ValueError("a bad batch")
        return self.blocks[2](Failing.apply(self.gain * self.blocks[1](x), fails == "backward"))


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, fails: bool) -> Tensor:
        ctx.fails = fails
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        if ctx.fails:
            raise ValueError("a bad batch")
        return gradient, None


def fragile_batch(index: int, fails: str = "") -> dict[str, Any]:
    return {"input": torch.randn(4, 5, generator=torch.Generator().manual_seed(index)), "fails": fails}


def call_fragile(model: nn.Module, batch: dict[str, Any]) -> Any:
    return model(batch["input"], batch["fails"])


def fragile_loss(output: Tensor, batch: dict[str, Any]) -> LossSum:
    if batch["fails"] == "loss":
        raise ValueError("a bad batch")
    return LossSum(output.square().sum(), len(output))


def steps_around(plan: Plan, failures: list[str]) -> list[Tensor]:
    with Mesh.from_env(plan) as mesh:
        torch.manual_seed(0)
        model = parallelize(Fragile(), mesh, plan)
        engine = NativeEngine(model, adamw(model), fragile_loss, forward=call_fragile)
        for step in range(3):
            for fails in failures:
                with pytest.raises(ValueError, match="a bad batch"):
                    engine.forward_backward([fragile_batch(7), fragile_batch(8, fails)])
            engine.forward_backward([fragile_batch(10 * step + i + mesh.rank) for i in (0, 2)])
            engine.clip(1.0)
            engine.step()
        return bits(model)


def survivors() -> list[str]:
    damaged = []
    for plan in (Plan(), Plan(zero=1), Plan(zero=2), Plan(zero=3), Plan(zero=3, recompute="blocks")):
        unharmed = steps_around(plan, [])
        for fails in ("forward", "loss", "backward"):
            if not all(map(torch.equal, unharmed, steps_around(plan, [fails]))):
                damaged.append(f"{plan}: {fails}")
    return damaged


def test_an_error_on_all_ranks_leaves_no_trace_in_the_next_step(ranks: RankPools) -> None:
    assert ranks(2, survivors) == [[], []]
    assert ranks(1, survivors) == [[]]


def twice() -> bool:
    with Mesh.from_env(Plan(zero=2)) as mesh:
        models = []
        for times in (1, 2):
            model = parallelize(perceptron(), mesh, Plan(zero=2))
            engine = NativeEngine(model, adamw(model), weighted)
            for _ in range(times):
                engine.forward_backward([sometimes_weightless(4)])
            engine.step()
            models.append(bits(model))
        return all(map(torch.equal, *models))


def test_gradients_that_no_step_took_are_forgotten(ranks: RankPools) -> None:
    assert ranks(2, twice) == [True, True]


# ── overflow ──────────────────────────────────────────────────────────────────────────────────────────────────────


def too_large_on_rank_1(output: Tensor, batch: Any) -> Tensor:
    return output.mean() * batch[1]


def overflow_on_one_rank(zero: int) -> dict[str, Any]:
    plan = Plan(zero=zero, precision="fp16", loss_scale=LossScale(initial=64.0, window=2, minimum=16.0))
    with Mesh.from_env(plan) as mesh:
        model = parallelize(perceptron(), mesh, plan)
        engine = NativeEngine(model, adamw(model), too_large_on_rank_1)
        before = bits(model)
        steps, scales = [], []

        def step(factor: float) -> None:
            engine.forward_backward([(torch.ones(2, 5), factor if mesh.rank == 1 else 1.0)])
            steps.append(engine.step())
            scales.append(engine.loss_scale)

        step(1e9)
        unchanged = all(map(torch.equal, before, bits(model)))
        for _ in range(4):
            step(1.0)
        changed = not all(map(torch.equal, before, bits(model)))
        for _ in range(3):
            step(1e9)
        with pytest.raises(TrainfleetError, match="smallest loss scale, 16"):
            step(1e9)
        replicas = mesh.data_axes.exchange([float(p.sum()) for p in bits(model)])
    return {
        "steps": steps,
        "scales": scales,
        "unchanged": unchanged,
        "changed": changed,
        "equal": replicas[0] == replicas[1],
        "counted": engine.steps,
    }


@pytest.mark.parametrize("zero", [0, 3])
def test_an_overflow_on_one_rank_skips_the_step_on_all(ranks: RankPools, zero: int) -> None:
    first, second = ranks(2, overflow_on_one_rank, zero)
    assert first == second
    assert first["steps"] == [False, True, True, True, True, False, False, False]
    assert first["scales"] == [32.0, 32.0, 64.0, 64.0, 128.0, 64.0, 32.0, 16.0]
    assert first["unchanged"] and first["changed"] and first["equal"] and first["counted"] == 8


def fixed_scale() -> list[Any]:
    plan = Plan(precision="fp16", loss_scale=LossScale(initial=1024.0, fixed=True))
    with Mesh.from_env(plan) as mesh:
        model = parallelize(perceptron(), mesh, plan)
        engine = NativeEngine(model, adamw(model), too_large_on_rank_1)
        outcomes = []
        for factor in (1e9, 1.0):
            engine.forward_backward([(torch.ones(2, 5), factor)])
            outcomes.append((engine.step(), engine.loss_scale))
        return outcomes


def test_a_fixed_scale_stays(ranks: RankPools) -> None:
    assert ranks(1, fixed_scale) == [[(False, 1024.0), (True, 1024.0)]]


# ── refusals ──────────────────────────────────────────────────────────────────────────────────────────────────────


def refused(make: Callable[[nn.Module], torch.optim.Optimizer], batches: list[Any], loss: Any, unfreeze: bool) -> None:
    with Mesh.from_env(Plan(zero=1)) as mesh:
        model = perceptron()
        model[0].bias.requires_grad_(False)
        early = adamw(model)
        parallelize(model, mesh, Plan(zero=1))
        engine = NativeEngine(model, make(model) if make is not None else early, loss)
        if unfreeze:
            model[0].bias.requires_grad_(True)
        engine.forward_backward(batches)


def lbfgs(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(model.parameters())


def rows_of_loss(output: Tensor, batch: Any) -> Tensor:
    return output.squeeze(-1)


@pytest.mark.parametrize(
    ("make", "batches", "loss", "unfreeze", "error", "message"),
    [
        (None, [], weighted, False, PlanError, "4 of the 4 tensors that AdamW holds .* Make it afterwards"),
        (adamw, [], weighted, False, DataError, "at least one micro-batch"),
        (adamw, [torch.ones(3, 5)], rows_of_loss, False, DataError, r"returned \(3,\); it must return a scalar"),
        (adamw, [torch.ones(3, 5)], weighted, True, PlanError, "requires_grad of 0.bias has changed"),
    ],
)
def test_misuse_is_a_sentence(
    ranks: RankPools, make: Any, batches: Any, loss: Any, unfreeze: bool, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ranks(1, refused, make, batches, loss, unfreeze)


def with_lbfgs() -> None:
    with Mesh.from_env(Plan()) as mesh:
        model = parallelize(perceptron(), mesh, Plan())
        NativeEngine(model, lbfgs(model), weighted)


def test_an_optimizer_that_wants_the_loss_again_is_refused(ranks: RankPools) -> None:
    with pytest.raises(PlanError, match="LBFGS computes the loss several times"):
        ranks(1, with_lbfgs)


# ── how models are called ─────────────────────────────────────────────────────────────────────────────────────────


class Tokens(UserDict[str, Any]):
    """As a tokenizer's output: a mapping that is no dict, with a constructor of its own."""

    def __init__(self, data: dict[str, Any], encoding: str = "") -> None:
        super().__init__(data)
        self.encoding = encoding


def test_a_batch_reaches_the_model_in_its_form() -> None:
    def model(*args: Any, **kwargs: Any) -> Any:
        return args, kwargs

    x, y = object(), object()
    assert call_with_batch(model, {"input": x, "target": y}) == ((x,), {})
    assert call_with_batch(model, {"inputs": x, "target": y}) == ((x,), {})
    assert call_with_batch(model, {"a": x, "b": y}) == ((), {"a": x, "b": y})
    assert call_with_batch(model, Tokens({"a": x}, "bytes")) == ((), {"a": x})
    assert call_with_batch(model, (x, y)) == ((x,), {})
    assert call_with_batch(model, [x, y]) == ((x,), {})
    assert call_with_batch(model, (x, y, x)) == (((x, y, x),), {})
    assert call_with_batch(model, x) == ((x,), {})


class TwoDoors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("nobody calls it")

    def embed(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x * scale


def by_the_other_door(plan: Plan) -> list[Any]:
    def embed(model: nn.Module, batch: Tensor) -> Any:
        return model.embed(batch, scale=2.0)

    with Mesh.from_env(plan) as mesh:
        torch.manual_seed(0)
        model = parallelize(TwoDoors(), mesh, plan)
        seen: list[torch.dtype] = []

        def loss(output: Tensor, batch: Tensor) -> Tensor:
            seen.append(output.dtype)
            return output.square().mean()

        engine = NativeEngine(model, adamw(model), loss, forward=embed)
        for step in range(2):
            engine.forward_backward([torch.randn(3, 5, generator=torch.Generator().manual_seed(2 * step + mesh.rank))])
            engine.step()
        return [bits(model), seen]


def test_another_entry_point_trains_as_forward_does(ranks: RankPools) -> None:
    plans = [Plan(zero=zero, entry_points=("embed",), precision="bf16") for zero in (0, 1, 3)]
    (expected, seen), *others = [ranks(2, by_the_other_door, plan)[0] for plan in plans]
    assert set(seen) == {torch.float32}
    for found, _ in others:
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def tokens_pass() -> list[Any]:
    with Mesh.from_env(Plan()) as mesh:
        model = parallelize(Named(), mesh, Plan())
        engine = NativeEngine(model, adamw(model), functools.partial(_same_kind))
        return [engine.forward_backward([Tokens({"x": torch.ones(2, 5)}, "bytes")]).weight]


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tokens:
        return Tokens({"y": self.linear(x)}, "floats")


def _same_kind(output: Tokens, batch: Tokens) -> LossSum:
    assert (output.encoding, batch.encoding) == ("floats", "bytes")
    return LossSum(output["y"].sum(), len(batch["x"]))


def test_batches_and_outputs_of_foreign_classes_stay_what_they_are(ranks: RankPools) -> None:
    assert ranks(1, tokens_pass) == [[2.0]]
