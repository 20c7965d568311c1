"""What we take from torch without a public name does what we believe it does."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from oracle import whole
from rank_pool import RankPools
from torch import nn
from torch.distributed import _functional_collectives
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from trainfleet.mesh import Mesh
from trainfleet.parallel.torch_private import (
    exchange_within,
    forget_iteration,
    gathered_parameters,
    offsets_in_whole,
    reduce_unused_gradients,
    waits_within,
)
from trainfleet.plan import Plan


def sharded(mesh: Mesh) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1), nn.Linear(3, 2))
    fully_shard(model[1], mesh=mesh.torch["dp_shard"])
    return fully_shard(model, mesh=mesh.torch["dp_shard"])


def looked_into() -> dict[str, Any]:
    with Mesh.from_env(Plan(zero=3)) as mesh:
        root = sharded(mesh)
        before = gathered_parameters(root)
        forget_iteration(root)  # before anything has run
        x = torch.ones(1, 3)
        reduce_unused_gradients(root)
        for number in range(2):
            # A rank may skip a part.
            root.forward = (lambda x: root[1](x)) if mesh.rank == number else (lambda x: root[1](x) + root[2](x).sum())
            root(x).sum().backward()
        pairs = gathered_parameters(root)
        parameters = {parameter: name for name, parameter in root.named_parameters()}
        offsets = {name: offsets_in_whole(p) for p, name in parameters.items()}
        again = dict(gathered_parameters(root))
        return {
            "before": before,
            "names": sorted(parameters[sharded] for sharded, _ in pairs),
            "same objects": all(again[sharded] is gathered for sharded, gathered in pairs),
            "shapes": all(sharded.shape == gathered.shape for sharded, gathered in pairs),
            "offsets": offsets,
            "used by one": float(whole(root[2].weight.grad).sum()),
            "unused": float(whole(root[0].weight.grad).abs().sum()),
        }


def test_gathered_parameters_offsets_and_gradients_that_some_ranks_lack(ranks: RankPools) -> None:
    first, second = ranks(2, looked_into)
    assert first["before"] == [] and first["same objects"] and first["shapes"]
    assert first["names"] == sorted(f"{i}.{kind}" for i in range(3) for kind in ("weight", "bias"))
    assert first["offsets"]["0.weight"] == (0, 0) and second["offsets"]["0.weight"] == (2, 0)
    # Each rank used it once with a gradient of ones: 6 elements, halved, twice.
    assert first["used by one"] == second["used by one"] == 6.0
    assert first["unused"] == 0.0


def forgotten() -> list[Any]:
    with Mesh.from_env(Plan(zero=3)) as mesh:
        root = sharded(mesh)
        x = torch.ones(1, 3)
        root.forward = lambda x: root[1](x)
        root.set_requires_gradient_sync(False)
        root(x).sum().backward()
        root(x)
        forget_iteration(root)
        at_rest = all(isinstance(parameter, DTensor) for parameter in root.parameters())
        root.set_requires_gradient_sync(True)
        root(x).sum().backward()
        return [at_rest, float(whole(root[1].bias.grad).sum())]


def test_a_forgotten_iteration_leaves_no_gradient_and_nothing_gathered(ranks: RankPools) -> None:
    assert ranks(2, forgotten) == [[True, 1.0]] * 2


def exchanges_seen(plan: Plan) -> list[Any]:
    """How often the loop came to exchanges of FSDP2, and waits of DTensors, and whether torch's own call is back."""
    counts = {"exchanges": 0, "waits": 0}

    def counted(name: str) -> AbstractContextManager[None]:
        counts[name] += 1
        return nullcontext()

    with Mesh.from_env(plan) as mesh:
        root = sharded(mesh)
        exchange_within(root, functools.partial(counted, "exchanges"))
        root.forward = lambda x: root[1](x)
        root(torch.ones(1, 3)).sum().backward()
        plain = _functional_collectives.wait_tensor
        weight = root[1].weight
        with waits_within(functools.partial(counted, "waits")):
            weight.full_tensor()
        weight.full_tensor()
        return [counts["exchanges"] > 0, counts["waits"], _functional_collectives.wait_tensor is plain]


def test_exchanges_and_waits_are_entered_where_the_loop_comes_to_them(ranks: RankPools) -> None:
    assert ranks(2, exchanges_seen, Plan(zero=3)) == [[True, 1, True]] * 2
