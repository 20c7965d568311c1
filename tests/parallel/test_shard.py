"""Sharded models of every odd kind compute what one process computes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from oracle import hold
from rank_pool import RankPools
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainfleet.comm.group import Group
from trainfleet.comm.threads import run_ranks
from trainfleet.loss import LossSum
from trainfleet.mesh import Mesh
from trainfleet.mpi import AdamW, Sequential, Sharded, Zero, mlp
from trainfleet.parallel import parallelize
from trainfleet.parallel.blocks import find_blocks
from trainfleet.parallel.shard import shared_parameters, units_of, unshardable_parameters
from trainfleet.plan import Plan
from trainfleet.training.proof.case import Case

WIDTH = 6


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, *, gain: Tensor | float = 1.0) -> Tensor:
        return x + gain * torch.tanh(self.linear(self.norm(x)))


class Tied(nn.Module):
    """The last matrix of each block is the root's, another is shared by the blocks alone; a block runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleDict({"first": Block(), "last": Block()})
        self.blocks["last"].linear.weight = self.stem.weight
        self.blocks["last"].norm.weight = self.blocks["first"].norm.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for name in ("first", "last", "first"):
            x = self.blocks[name](x)
        return x


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, WIDTH)
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) * torch.sigmoid(self.gate(x))


class Nested(nn.Module):
    """Blocks inside blocks, where they are named; one inner module stands in two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Inner() for _ in range(3))
        self.layers[2].gate = self.layers[0].gate
        self.few = nn.Linear(WIDTH, 1)  # a shard of it is empty on most ranks

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.few(x)


class Dtypes(nn.Module):
    """Scalars, complex and float64 parameters, frozen ones of bfloat16 and integers, one without elements."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(2)))
        self.waves = nn.Parameter(torch.randn(WIDTH, dtype=torch.complex64))
        self.fine = nn.Parameter(torch.randn(WIDTH, dtype=torch.float64))
        self.rough = nn.Parameter(torch.randn(5, WIDTH).bfloat16(), requires_grad=False)
        self.counts = nn.Parameter(torch.arange(WIDTH), requires_grad=False)
        self.nothing = nn.Parameter(torch.empty(0, WIDTH))
        self.gain = nn.Parameter(torch.tensor(0.7))
        self.register_buffer("shift", torch.linspace(-1, 1, WIDTH), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.gain * self.blocks(x) + self.shift + 0.1 * self.counts
        spectrum = torch.view_as_real(torch.fft.fft(x) * self.waves).flatten(1)
        return torch.cat([spectrum, x * self.fine.float(), x @ self.rough.float().T], 1)


class Partly(nn.Module):
    """A part is used by no rank, one by the ranks with odd micro-batches only; low-rank matrices on frozen ones."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH)
        self.base.requires_grad_(False)
        self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.sometimes = Block()
        self.never = Block()
        self.never_scalar = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor, *, is_odd: Tensor) -> Tensor:
        x = self.base(x) + self.up(self.down(x))
        for block in self.blocks:
            x = block(x, gain=0.5)
        return self.sometimes(x) if is_odd else x


@dataclass
class Output:
    hidden: dict[str, Tensor]
    name: str = "wrapped"


class Wrapped(nn.Module):
    """Keyword arguments in; a dataclass of a dict out; recurrent."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrence = nn.LSTM(WIDTH, WIDTH, num_layers=2)
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, *, x: Tensor, is_odd: Tensor | None = None) -> Output:
        return Output({"y": self.blocks(self.recurrence(x)[0])})


def rows(index: int) -> Tensor:
    generator = torch.Generator().manual_seed(index)
    return torch.randn(2 + index % 3, WIDTH, generator=generator)


def input_only(index: int) -> dict[str, Tensor]:
    return {"input": rows(index)}


def keywords(index: int) -> dict[str, Tensor]:
    return {"x": rows(index), "is_odd": torch.tensor(index % 2 == 1)}


def squares(output: Any, batch: Any) -> LossSum:
    y = output.hidden["y"] if isinstance(output, Output) else output
    return LossSum((y - 1).square().sum(), len(y))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Two groups. A large eps, so that rounding in tiny gradients makes no steps of full size."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "lr": 2e-2}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=5e-3, weight_decay=0.1, eps=1e-3)


def built(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make()


def single_linear() -> nn.Module:
    return nn.Linear(WIDTH, 3)


def case_of(make: Callable[[], nn.Module]) -> Case:
    return Case(
        build=functools.partial(built, make),
        loss_fn=squares,
        micro_batch=keywords if make in (Partly, Wrapped) else input_only,
        optimizer=adamw,
        steps=3,
        accumulation=2,
    )


EVERY_STAGE = [Plan(zero=zero) for zero in (0, 1, 2, 3)]
MODELS = {
    "one linear layer": (single_linear, EVERY_STAGE),
    "tied to the root and across blocks": (Tied, EVERY_STAGE),
    "blocks in blocks": (Nested, [Plan(zero=zero, blocks=("Inner", "layers.*.block")) for zero in (1, 2, 3)]),
    "odd dtypes": (Dtypes, EVERY_STAGE),
    "unused, frozen, low rank": (Partly, EVERY_STAGE),
    "wrapped and recurrent": (Wrapped, EVERY_STAGE),
}


@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_compute_what_one_process_computes(ranks: RankPools, name: str) -> None:
    make, plans = MODELS[name]
    # As small models they are one unit in stages 1 and 2 unless blocks are named.
    by_block = [replace(plan, blocks=found_in(make)) for plan in plans if plan.zero in (1, 2) and not plan.blocks]
    hold(ranks, 2, case_of(make), [*plans, *(by_block if found_in(make) else ())])


def found_in(make: Callable[[], nn.Module]) -> tuple[str, ...]:
    model = make()
    blocks = find_blocks(model)
    return tuple(name for name, module in model.named_modules() if module in blocks)


def test_blocks_are_units_where_they_are_named_where_parameters_leave_and_in_large_models() -> None:
    model, large = nn.Sequential(Block(), Block()), nn.Sequential(*(nn.Sequential(nn.Linear(2000, 2000)) for _ in "ab"))
    blocks = find_blocks(model)
    assert len(blocks) == 2 and not units_of(model, blocks, Plan(zero=2))
    assert units_of(model, blocks, Plan(zero=3)) == blocks
    assert units_of(model, blocks, Plan(zero=2, blocks=("Block",))) == blocks
    assert units_of(large, find_blocks(large), Plan(zero=1)) == list(large)


@pytest.mark.parametrize("make", [Tied, Nested, Partly])
def test_two_copies_of_two_shards_compute_what_one_process_computes(
    ranks: RankPools, make: Callable[[], nn.Module]
) -> None:
    plans = [Plan(zero=zero, dp_replicate=2, dp_shard=2, blocks=blocks_of(make)) for zero in (1, 2, 3)]
    hold(ranks, 4, case_of(make), plans)


@pytest.mark.parametrize("make", [Nested, Partly])
def test_three_ranks_compute_what_one_process_computes(ranks: RankPools, make: Callable[[], nn.Module]) -> None:
    hold(ranks, 3, case_of(make), [Plan(zero=zero, blocks=blocks_of(make)) for zero in (0, 1, 3)])


def blocks_of(make: Callable[[], nn.Module]) -> tuple[str, ...]:
    return ("Inner", "layers.*.block") if make is Nested else ()


ROWS = np.random.default_rng(0).normal(size=(8, WIDTH))


def in_torch(zero: int, start: dict[str, Any]) -> dict[str, Any]:
    """Three steps of AdamW by FSDP2, on this rank's half of the rows."""
    plan = Plan(zero=zero)  # type: ignore[arg-type]
    with Mesh.from_env(plan) as mesh:
        model = nn.Sequential(nn.Linear(WIDTH, 7), nn.GELU(approximate="tanh"), nn.Linear(7, 3)).double()
        model.load_state_dict({name: torch.tensor(value) for name, value in start.items()})
        parallelize(model, mesh, plan)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        for _ in range(3):
            (model(torch.tensor(ROWS[mesh.rank :: 2])) - 1).square().sum().div(len(ROWS) / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
        return {
            name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().numpy()
            for name, p in model.named_parameters()
        }


def in_numpy(group: Group, zero: Any, start: dict[str, Any]) -> dict[str, Any]:
    """The same by the few lines of `trainfleet.mpi`, which share no code with FSDP2."""
    model = mlp([WIDTH, 7, 3], dtype=np.float64)
    model.parameters.update({name: value.copy() for name, value in start.items()})
    optimizer = Zero(AdamW(learning_rate=0.05), zero, group)
    optimizer.register(model.parameters)
    sharded = Sequential({name: Sharded(layer, optimizer, name) for name, layer in model.layers.items()})
    for _ in range(3):
        y, saved = sharded.forward(ROWS[group.rank :: 2])
        sharded.backward(saved, 2 * (y - 1) / (len(ROWS) / 2))
        optimizer.step()
    return optimizer.gather(model.parameters)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_every_stage_takes_the_steps_of_the_readable_reference(ranks: RankPools, zero: int) -> None:
    """In float64, of which some 1e-15 are lost in three steps: whatever differs by more is another computation."""
    start = {name: np.array(value) for name, value in mlp([WIDTH, 7, 3], dtype=np.float64).parameters.items()}
    expected = run_ranks(2, lambda group: in_numpy(group, zero, start))[0]
    for found in ranks(2, in_torch, zero, start):
        assert found.keys() == expected.keys()
        for name, value in found.items():
            assert value.dtype == np.float64
            assert np.abs(value - start[name]).max() > 0.1, "three steps of 0.05 each"
            np.testing.assert_allclose(value, expected[name], rtol=1e-11, atol=1e-13, err_msg=name)


def pieces() -> dict[str, Any]:
    with Mesh.from_env(Plan(zero=3)) as mesh:
        kinds = {}
        for make in (Tied, Nested, Dtypes):
            model = parallelize(built(make), mesh, Plan(zero=3, blocks=blocks_of(make)))
            kinds[make.__name__] = {n: isinstance(p, DTensor) for n, p in model.named_parameters()}
        linear = parallelize(nn.Linear(4, 1), mesh, Plan(zero=3))
        kinds["rows"] = linear.weight.to_local().shape[0]
        tied = parallelize(built(Tied), mesh, Plan(zero=3))
        kinds["still tied"] = tied.blocks["last"].linear.weight is tied.stem.weight
    return kinds


def test_only_what_cannot_be_cut_stays_whole(ranks: RankPools) -> None:
    first, second = ranks(2, pieces)
    assert [name for name, cut in first["Tied"].items() if not cut] == ["blocks.first.norm.weight"]
    assert [name for name, cut in first["Nested"].items() if not cut] == ["layers.0.gate.weight", "layers.0.gate.bias"]
    assert [name for name, cut in first["Dtypes"].items() if not cut] == ["waves", "fine", "nothing", "gain"]
    assert (first["rows"], second["rows"]) == (1, 0)
    assert first["still tied"]


def test_shared_is_what_two_units_hold() -> None:
    def names(model: nn.Module, blocks: tuple[str, ...] = ()) -> set[str]:
        shared = shared_parameters(model, find_blocks(model, blocks))
        return {name for name, parameter in model.named_parameters() if parameter in shared}

    assert names(Tied()) == {"stem.weight", "blocks.first.norm.weight"}
    assert names(Nested(), ("Inner", "layers.*.block")) == {"layers.0.gate.weight", "layers.0.gate.bias"}
    plain = Nested()
    plain.layers[2] = plain.layers[0]  # one block in two places is one unit
    assert names(plain, ("Inner", "layers.*.block")) == set()
    plain.layers[1].gate.bias = plain.layers[1].block.linear.bias  # between a block and the block around it
    assert names(plain, ("Inner", "layers.*.block")) == {"layers.1.gate.bias"}
    assert names(nn.Linear(2, 2)) == set()


def test_most_numbers_choose_the_dtype_that_is_cut() -> None:
    model = nn.ParameterDict({"a": torch.zeros(3, dtype=torch.float64), "b": torch.zeros(2), "c": torch.zeros(())})
    assert unshardable_parameters(model) == {model["b"], model["c"]}
    model["waves"] = nn.Parameter(torch.zeros(9, dtype=torch.complex64))
    assert model["waves"] in unshardable_parameters(model) and model["a"] not in unshardable_parameters(model)
