"""Gradients of whole parameters are averaged over the ranks, however backward reaches them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rank_pool import RankPools
from torch import Tensor, nn

from trainfleet.errors import PlanError
from trainfleet.mesh import Mesh
from trainfleet.parallel import replicate
from trainfleet.parallel.replicate import GradientAverage, refuse_sparse_gradients
from trainfleet.plan import Plan


class Branches(nn.Module):
    """Rank r may take a branch of its own; a scalar, float64 and complex parameters; one module runs twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(4, 4)
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)
        self.gain = nn.Parameter(torch.tensor(2.0))
        self.fine = nn.Parameter(torch.ones(4, dtype=torch.float64))
        self.wave = nn.Parameter(torch.ones(4, dtype=torch.complex64))
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)
        self.nobody = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor, *, left: bool) -> Tensor:
        x = self.stem(self.stem(x))
        x = (self.left if left else self.right)(x)
        return (self.gain * x * self.fine + self.frozen) * self.wave.real


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def sample(rank: int, step: int) -> Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(10 * step + rank))


def loss_of(model: nn.Module, rank: int, step: int) -> Tensor:
    return model(sample(rank, step), left=rank % 2 == 0).square().sum()


def expected(size: int) -> dict[str, Tensor]:
    """The mean over ranks of two backwards each."""
    model = Branches()
    for rank in range(size):
        for step in range(2):
            (loss_of(model, rank, step) / size).backward()
    return {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in model.named_parameters()}


def averaged(first_bucket_bytes: int, overlap: bool) -> list[str]:
    replicate.FIRST_BUCKET_BYTES = replicate.BUCKET_BYTES = first_bucket_bytes
    wrong = []
    with Mesh.from_env(Plan()) as mesh:
        wanted = expected(mesh.world_size)
        for how in ("accumulated", "one after the other", "expected", "after an error"):
            model = Branches()
            average = GradientAverage(list(model.parameters()), mesh.data_axes, overlap=overlap)
            if how == "after an error":
                loss = loss_of(model, 1, 0)  # of all ranks alike, or what is on the wire could not be told apart
                model.stem.weight.register_hook(fail_once())
                with pytest.raises(ValueError, match="once"):
                    loss.backward()
                average.forget()
                model.zero_grad()
            average.enabled = how == "one after the other"
            loss_of(model, mesh.rank, 0).backward()
            average.enabled = True
            if how == "expected":
                average.expect()
            loss_of(model, mesh.rank, 1).backward()
            if how == "expected":
                average.finish()
            average.finish()  # again: nothing
            found = gradients(model)
            assert found.pop("frozen") is None
            wrong += [
                f"{name}, {how}"
                for name, gradient in found.items()
                if not torch.allclose(gradient, wanted[name], rtol=1e-5, atol=1e-5)
            ]
    replicate.FIRST_BUCKET_BYTES, replicate.BUCKET_BYTES = 1 << 20, 25 << 20
    return wrong


def fail_once() -> Any:
    left = [True]

    def hook(gradient: Tensor) -> None:
        if left and left.pop():
            raise ValueError("once")

    return hook


@pytest.mark.parametrize(("bucket_bytes", "overlap"), [(1 << 20, True), (1, True), (100, True), (100, False)])
def test_the_mean_is_that_of_all_ranks(ranks: RankPools, bucket_bytes: int, overlap: bool) -> None:
    for size in (2, 3):
        assert ranks(size, averaged, bucket_bytes, overlap) == [[]] * size


def nothing_reached() -> list[Any]:
    with Mesh.from_env(Plan()) as mesh:
        model = nn.Linear(2, 2)
        average = GradientAverage(list(model.parameters()), mesh.data_axes)
        average.expect()
        if mesh.rank == 0:
            model(torch.ones(1, 2)).sum().backward()
        average.finish()
        return model.weight.grad.tolist()


def test_a_rank_that_reached_nothing_still_takes_part(ranks: RankPools) -> None:
    assert ranks(2, nothing_reached) == [[[0.5, 0.5], [0.5, 0.5]]] * 2


class Alone:
    """A group that fails if it is used."""

    rank, size = 0, 1


def test_one_rank_sends_nothing() -> None:
    model = nn.Linear(2, 2)
    average = GradientAverage(list(model.parameters()), Alone())
    average.expect()
    model(torch.ones(1, 2)).sum().backward()
    average.finish()
    assert model.weight.grad.tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_buckets_go_from_the_last_parameter_to_the_first() -> None:
    kinds = ((300_000, torch.float32), (3, torch.float64), (4, torch.float32), (300_000, torch.float32))
    parameters = [nn.Parameter(torch.zeros(size, dtype=dtype)) for size, dtype in kinds]
    buckets = [bucket.parameters for bucket in replicate._buckets(parameters, Alone())]
    assert [len(bucket) for bucket in buckets] == [1, 2, 1]
    assert buckets[0][0] is parameters[3] and buckets[1][0] is parameters[2] and buckets[1][1] is parameters[0]
    assert buckets[2][0] is parameters[1]


def test_sparse_gradients_are_refused_by_name() -> None:
    refuse_sparse_gradients(nn.Sequential(nn.Embedding(2, 2)))
    with pytest.raises(PlanError, match="1 is a EmbeddingBag with sparse=True"):
        refuse_sparse_gradients(nn.Sequential(nn.Embedding(2, 2), nn.EmbeddingBag(2, 2, sparse=True)))
