"""A tensor's layout tells over which axes it is split, and in whose care it is."""

from __future__ import annotations

import torch
from rank_pool import RankPools
from split_models import build

from trainfleet.mesh import Mesh
from trainfleet.parallel import parallelize
from trainfleet.parallel.layout import axes_of, is_sharded, is_split_over
from trainfleet.plan import Plan


def layouts(plan: Plan) -> dict[str, tuple[tuple[str, ...], bool, bool, bool]]:
    with Mesh.from_env(plan) as mesh:
        model = parallelize(build("perceptron"), mesh, plan)
        return {
            name: (axes_of(p), is_split_over(p, "tp"), is_split_over(p, "dp_shard"), is_sharded(p))
            for name, p in model.named_parameters()
        }


def test_split_and_sharded_parameters_are_told_apart(ranks: RankPools) -> None:
    split = ranks(2, layouts, Plan(tp=2))[0]
    assert split["head.weight"] == ((), False, False, False)
    assert split["blocks.0.parts.0.up.bias"] == (("tp",), True, False, False)
    assert split["blocks.0.parts.0.down.weight"] == (("tp",), True, False, False)
    assert split["blocks.0.parts.0.down.bias"] == (("tp",), False, False, False)
    sharded = ranks(4, layouts, Plan(tp=2, zero=3))[0]
    assert sharded["head.weight"] == (("dp_shard", "cp"), False, True, True)
    assert sharded["blocks.0.parts.0.down.weight"] == (("dp_shard", "tp", "cp"), True, True, True)
    assert not is_split_over(torch.ones(2), "tp")
