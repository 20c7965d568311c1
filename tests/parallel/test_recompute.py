"""Recomputing blocks changes the memory and nothing else."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rank_pool import RankPools
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from trainfleet.errors import PlanError
from trainfleet.mesh import Mesh
from trainfleet.parallel import parallelize
from trainfleet.parallel.blocks import find_blocks
from trainfleet.parallel.recompute import PRODUCTS, recompute
from trainfleet.plan import Plan


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.linear = nn.Linear(width, 4 * width)
        self.back = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(0.3)
        self.calls = 0

    def forward(self, x: Tensor, *, gain: Tensor) -> Tensor:
        self.calls += 1
        return x + gain * self.dropout(self.back(torch.relu(self.linear(self.norm(x)))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, gain=torch.tensor(0.5))
        return x


def model_of(*, recomputing: bool, keep: Sequence[str] = ()) -> Model:
    torch.manual_seed(0)
    model = Model()
    if recomputing:
        recompute(find_blocks(model), keep)
    return model


def saved_bytes(run: Any) -> int:
    """Bytes of distinct memory that `run` keeps for backward."""
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(held.values())


def test_gradients_dropout_and_batch_statistics_are_the_same() -> None:
    found = []
    for recomputing in (False, True):
        model = model_of(recomputing=recomputing)
        torch.manual_seed(1)
        for _ in range(2):
            model(torch.randn(6, 8)).square().sum().backward()
        found.append([*(p.grad for p in model.parameters()), *model.buffers(), torch.rand(1)])
    assert all(map(torch.equal, *found))
    assert model.blocks[0].norm.num_batches_tracked == 2 and model.blocks[0].calls == 4


def test_activations_of_a_block_are_forgotten() -> None:
    x = torch.randn(512, 8)
    kept, forgotten = (saved_bytes(functools.partial(model_of(recomputing=r), x)) for r in (False, True))
    # Each block keeps its input, and a scalar gain, of what was four widths and more.
    assert forgotten < kept / 5 and forgotten < 4 * (x.nbytes + 4096)


class Calls(TorchDispatchMode):
    """How often each operator of torch ran."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("keep", [PRODUCTS, ("relu",)], ids=["products", "relu"])
def test_what_is_kept_is_not_computed_again_and_all_else_is(keep: Sequence[str]) -> None:
    found, counts = [], []
    for kept in ((), keep):
        model = model_of(recomputing=True, keep=kept)
        torch.manual_seed(1)
        loss = model(torch.randn(6, 8)).square().sum()
        with Calls() as calls:
            loss.backward()
        counts.append(calls.counts)
        found.append([*(p.grad for p in model.parameters()), *model.buffers()])
    assert all(map(torch.equal, *found))
    everything, selective = counts
    kept_ones = ("addmm",) if keep is PRODUCTS else keep
    assert all(everything[name] >= 4 and selective[name] == 0 for name in kept_ones)
    again = {"addmm", "relu", "native_batch_norm", "bernoulli_"} - set(kept_ones)
    assert {name: everything[name] for name in again} == {name: selective[name] for name in again}


def test_every_other_block_can_be_recomputed() -> None:
    with Mesh.from_env(Plan()) as mesh:
        plan = Plan(recompute="blocks", recompute_every=2)
        model = parallelize(model_of(recomputing=False), mesh, plan)
        model(torch.randn(6, 8)).sum().backward()
        assert isinstance(model, Model) and [block.calls for block in model.blocks] == [2, 1, 2, 1]


class Caching(nn.Module):
    """Keeps what it has seen, as language models do for generation, where its configuration says so."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(use_cache=True)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))

    def forward(self, x: Tensor, use_cache: bool | None = None) -> Tensor:
        past = [] if (self.config.use_cache if use_cache is None else use_cache) else None
        for block in self.blocks:
            x = x + block(x if past is None else torch.cat([*past, x]))[-len(x) :]
        return x


def test_nothing_is_kept_for_generation_unless_it_is_asked_for() -> None:
    with Mesh.from_env(Plan()) as mesh:
        model = Caching()
        parallelize(model, mesh, Plan(recompute="blocks"))
        assert model.config.use_cache is False
        assert model(torch.randn(3, 4), use_cache=True).shape == (3, 4)


def test_an_operator_that_torch_does_not_have_is_refused() -> None:
    with pytest.raises(PlanError, match="names 'adddmm', but torch has no such operator"):
        recompute([nn.Linear(2, 2)], ["adddmm"])


def test_without_gradients_nothing_is_recomputed() -> None:
    model = model_of(recomputing=True).eval()
    with torch.no_grad():
        model(torch.randn(6, 8))
    assert [block.calls for block in model.blocks] == [1] * 4


def test_a_block_in_a_recomputed_block_counts_once() -> None:
    found = []
    for recomputing in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh()) for _ in range(2)))
        outer = nn.Sequential(model, nn.Linear(3, 3))
        if recomputing:
            recompute([model, *model])
        outer(torch.randn(5, 3)).sum().backward()
        found.append([*(p.grad for p in outer.parameters()), *outer.buffers()])
    assert all(map(torch.equal, *found))


def spread(plan: Plan) -> list[Tensor]:
    with Mesh.from_env(plan) as mesh:
        model = parallelize(model_of(recomputing=False), mesh, plan)
        torch.manual_seed(1)
        loss = model(torch.randn(6, 8)).square().sum()
        loss.backward()
        return [loss.detach(), *(buffer.clone() for buffer in model.buffers())]


def test_under_sharding_and_low_precision_too(ranks: RankPools) -> None:
    for zero in (0, 3):
        for precision in ("fp32", "bf16"):
            plain, again = (
                ranks(2, spread, Plan(zero=zero, precision=precision, recompute=how)) for how in ("none", "blocks")
            )
            selective = ranks(2, spread, Plan(zero=zero, precision=precision, recompute="selective"))
            for a, b, c in zip(plain, again, selective):
                assert all(map(torch.equal, a, b)) and all(map(torch.equal, a, c))


def without_blocks() -> None:
    with Mesh.from_env(Plan()) as mesh:
        parallelize(nn.Linear(2, 2), mesh, Plan(recompute="blocks"))


def test_a_model_without_blocks_is_refused(ranks: RankPools) -> None:
    with pytest.raises(PlanError, match=r"Linear has no repeated modules. Name them in plan.blocks"):
        ranks(1, without_blocks)
