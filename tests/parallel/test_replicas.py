"""A digest shows every change, and a replica that has come apart is named on every rank."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_pool import RankPools
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainfleet.errors import ReplicasDiffer
from trainfleet.mesh import Mesh
from trainfleet.parallel import parallelize
from trainfleet.parallel.replicas import check_replicas, digests
from trainfleet.plan import Plan

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.complex128]


def digest(tensor: Tensor) -> str:
    return digests({"x": tensor})["x"]


def numbers(dtype: torch.dtype, size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(size, dtype=dtype if dtype != torch.bfloat16 else torch.float32, generator=generator).to(
            dtype
        )
    return torch.randint(2, (size,), generator=generator).to(dtype)


@settings(max_examples=60)
@given(st.sampled_from(DTYPES), st.integers(1, 70), st.integers(0, 1 << 16), st.data())
def test_any_flipped_bit_shows(dtype: torch.dtype, size: int, seed: int, data: Any) -> None:
    tensor = numbers(dtype, size, seed)
    before = digest(tensor)
    raw = tensor.view(torch.uint8)
    place = data.draw(st.integers(0, raw.numel() - 1))
    raw[place] ^= 1 if dtype == torch.bool else 1 << data.draw(st.integers(0, 7))
    assert digest(tensor) != before


@settings(max_examples=60)
@given(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), st.integers(2, 3000), st.data())
def test_any_two_swapped_numbers_show(dtype: torch.dtype, size: int, data: Any) -> None:
    tensor = numbers(dtype, size, 1)
    i, j = (data.draw(st.integers(0, size - 1)) for _ in range(2))
    swapped = tensor.clone()
    swapped[i], swapped[j] = tensor[j].clone(), tensor[i].clone()
    assert (digest(swapped) == digest(tensor)) == torch.equal(swapped, tensor)


def test_a_swap_shows_where_numbers_differ_in_their_upper_bits_and_places_in_one_bit() -> None:
    for dtype in (torch.float64, torch.float32):
        tensor = torch.ones((1 << 13) + 1, dtype=dtype)
        for distance in (1 << 12, 1 << 13):
            one, other = tensor.clone(), tensor.clone()
            one[0], other[distance] = 2.0, 2.0
            assert digest(one) != digest(other)


def test_a_digest_depends_on_the_numbers_alone() -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    assert digest(whole.T) == digest(whole.T.contiguous()) != digest(whole)
    assert digest(torch.tensor(3.0)) == digest(torch.tensor([3.0]))
    assert digest(torch.tensor(0.0)) != digest(torch.tensor(-0.0))
    assert digests({}) == {} and digest(torch.empty(0)) == digest(torch.ones(2, device="meta"))


def test_a_large_tensor_is_taken_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(1000)
    at_once = digest(tensor)
    monkeypatch.setattr("trainfleet.parallel.replicas._CHUNK", 7)
    assert digest(tensor) == at_once


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.gain = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * self.linear(x)


def flipped(plan: Plan, name: str, rank: int) -> str:
    with Mesh.from_env(plan) as mesh:
        torch.manual_seed(0)
        model = parallelize(Model(), mesh, plan)
        check_replicas(model)
        if plan.zero:
            with torch.no_grad():
                model(torch.ones(1, 4))  # leaves it gathered; the pieces are what is compared
        if mesh.rank == rank:
            parameter = model.get_parameter(name) if plan.zero == 0 else dict(at_rest(model))[name]
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter.data
            local.view(-1).view(torch.uint8)[0] ^= 1
        with pytest.raises(ReplicasDiffer) as caught:
            check_replicas(model)
        return str(caught.value)


def at_rest(model: nn.Module) -> Any:
    from trainfleet.parallel.spread import spread_of

    spread_of(model).rest()
    return model.named_parameters()


@pytest.mark.parametrize(
    ("size", "plan", "name", "rank", "said"),
    [
        (2, Plan(), "linear.bias", 1, "Parameter linear.bias differs between rank 0 and rank 1."),
        (4, Plan(), "linear.weight", 2, "Parameter linear.weight on rank 2 differs from that on the other 3 ranks."),
        (
            4,
            Plan(zero=3, dp_replicate=2, dp_shard=2),
            "linear.weight",
            3,
            "Parameter linear.weight differs between rank 1 and rank 3.",
        ),
        (2, Plan(zero=2), "gain", 0, "Parameter gain differs between rank 0 and rank 1."),
    ],
)
def test_a_flipped_bit_is_named_on_all_ranks(
    ranks: RankPools, size: int, plan: Plan, name: str, rank: int, said: str
) -> None:
    for found in ranks(size, flipped, plan, name, rank):
        assert re.match(re.escape(said), found), found
