"""The mesh lays ranks on axes: groups, devices, ownership of the process group, and nothing that grows."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from trainfleet.errors import LaunchError, PlanError
from trainfleet.plan import Plan


def test_it_is_imported_without_torch():
    code = "import sys, trainfleet.mesh, trainfleet.comm.threads; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_every_mesh_has_its_axes_alike():
    from types import SimpleNamespace

    from trainfleet.mesh import Axes

    groups = {name: SimpleNamespace(size=size) for name, size in (("a", 2), ("b", 3))}
    axes = Axes({"a": 2, "b": 3}, groups, rank=4, world_size=6, data_axes=groups["a"])
    assert axes["b"] is groups["b"] and axes.plan_axes == {"a": 2, "b": 3} and not axes.is_main
    assert repr(axes) == "Mesh(a=2 x b=3, rank 4 of 6)"
    with pytest.raises(KeyError, match="no axis 'c'; it has a, b"):
        axes["c"]


def axes_of(plan):
    from trainfleet.mesh import Mesh

    with Mesh.from_env(plan, device="cpu") as mesh:
        assert mesh.torch.mesh_dim_names == ("dp_replicate", "dp_shard")
        assert mesh.torch["dp_shard"].size() == mesh["dp_shard"].size == mesh.plan_axes["dp_shard"]
        assert mesh.is_main == (mesh.rank == 0)
        assert mesh.device == "cpu"
        members = {name: mesh[name].exchange(mesh.rank) for name in (*mesh.plan_axes,)}
        return mesh.plan_axes, members, mesh.data_axes.exchange(mesh.rank)


@pytest.mark.parametrize(
    ("size", "plan", "degrees", "groups"),
    [
        (1, None, (1, 1), [([0], [0])]),
        (2, None, (2, 1), [([0, 1], [0]), ([0, 1], [1])]),
        (2, Plan(zero=2), (1, 2), [([0], [0, 1]), ([1], [0, 1])]),
        (
            4,
            Plan(zero=3, dp_replicate=2),
            (2, 2),
            [([0, 2], [0, 1]), ([1, 3], [0, 1]), ([0, 2], [2, 3]), ([1, 3], [2, 3])],
        ),
    ],
    ids=["one", "replicated", "sharded", "hybrid"],
)
def test_the_last_axis_varies_fastest(ranks, size, plan, degrees, groups):
    for (axes, members, everyone), (replicas, shards) in zip(ranks(size, axes_of, plan), groups, strict=True):
        assert axes == {"dp_replicate": degrees[0], "dp_shard": degrees[1]}
        assert members == {"dp_replicate": replicas, "dp_shard": shards}
        assert everyone == list(range(size))


def many_meshes(count):
    import psutil

    from trainfleet.mesh import Mesh

    plans = [Plan(zero=2), Plan(zero=0), Plan(zero=3, dp_replicate=2)]
    for plan in plans:
        Mesh.from_env(plan, device="cpu")
    before = psutil.Process().num_threads(), psutil.Process().num_fds()
    first = Mesh.from_env(plans[2], device="cpu")
    for number in range(count):
        Mesh.from_env(plans[number % 3], device="cpu").close()
    assert Mesh.from_env(plans[2], device="cpu").torch is first.torch
    return psutil.Process().num_threads() - before[0], psutil.Process().num_fds() - before[1]


def test_hundreds_of_meshes_cost_no_more_than_one_of_each(ranks):
    assert ranks(4, many_meshes, 300) == [(0, 0)] * 4


def keeps_the_group_it_found():
    import torch.distributed as dist

    from trainfleet.mesh import Mesh

    with Mesh.from_env(device="cpu"):
        pass
    return dist.is_initialized()


def test_a_process_group_that_stood_before_stays(ranks):
    assert ranks(2, keeps_the_group_it_found) == [True, True]


def makes_and_ends_its_own(port):
    """Twice in one process, as two programs after each other."""
    import torch.distributed as dist

    from trainfleet.mesh import Mesh

    rank, size = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    seen = []
    for _ in range(2):
        with Mesh.from_env(Plan(zero=1), device="cpu") as mesh:
            seen.append(mesh.data_axes.exchange(mesh.rank))
        mesh.close()  # a second time
        assert not dist.is_initialized()
    raise Finished(str(seen))  # the pool's own process group is gone: have it made anew


class Finished(Exception):
    pass


def test_a_process_group_of_its_own_ends_with_the_mesh(ranks):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(Finished, match=r"\[\[0, 1\], \[0, 1\]\]"):
        ranks(2, makes_and_ends_its_own, port)


def asks_for(device, plan=None):
    from trainfleet.mesh import Mesh

    Mesh.from_env(plan, device=device)


def test_what_cannot_be_is_refused(ranks):
    with pytest.raises(PlanError, match="there are 2"):
        ranks(2, asks_for, "cpu", Plan(zero=2, dp_shard=4, dp_replicate=1))
    with pytest.raises(LaunchError, match="'tpu'; use 'cpu'"):
        ranks(1, asks_for, "tpu")
    import torch

    if not torch.cuda.is_available():
        with pytest.raises(LaunchError, match="sees no GPU"):
            ranks(1, asks_for, "cuda")


def unknown_axis():
    from trainfleet.mesh import Mesh

    with pytest.raises(KeyError, match="no axis 'tp'; it has dp_replicate, dp_shard"):
        Mesh.from_env(device="cpu")["tp"]


def test_an_unknown_axis_names_the_known_ones(ranks):
    ranks(1, unknown_axis)


def trained_weights(plan):
    import torch
    from torch.distributed.fsdp import fully_shard

    from trainfleet.mesh import Mesh

    with Mesh.from_env(plan, device="cpu") as mesh:
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        if mesh.world_size > 1:
            fully_shard(model, mesh=mesh.torch if plan.dp_replicate else mesh.torch["dp_shard"])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        batch = torch.randn(8, 6, generator=torch.Generator().manual_seed(2)).chunk(mesh.world_size)[mesh.rank]
        for _ in range(3):
            model(batch).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        whole = [getattr(p, "full_tensor", lambda p=p: p)() for p in model.parameters()]
        return torch.cat([p.detach().flatten() for p in whole])


def test_fsdp_trains_on_its_device_mesh_as_one_process_does(ranks):
    import torch

    (alone,) = ranks(1, trained_weights, Plan(zero=3))
    for size, plan in [(2, Plan(zero=3)), (4, Plan(zero=3, dp_replicate=2))]:
        for weights in ranks(size, trained_weights, plan):
            torch.testing.assert_close(weights, alone, rtol=1e-5, atol=1e-6)


def of_sequences_and_experts():
    from trainfleet.mesh import Mesh

    with Mesh.from_env(Plan(cp=2, zero=1), device="cpu") as mesh:
        assert mesh.torch.mesh_dim_names == ("dp_replicate", "dp_shard", "cp")
        assert mesh.sharding.mesh_dim_names == ("dp_replicate", "dp_shard")
        found = [[mesh.data_axes.size, mesh["cp"].size, mesh.shard_axes.size, mesh.gradient_axes.size]]
    with Mesh.from_env(Plan(ep=2), device="cpu") as mesh:
        assert mesh.gradient_axes is mesh.data_axes
        groups = [mesh["ep"].exchange(mesh.rank), mesh["ep_replicate"].exchange(mesh.rank)]
    return [*found, groups]


def test_sequences_share_shards_and_experts_lie_on_neighbours(ranks):
    found = ranks(4, of_sequences_and_experts)
    assert [each[0] for each in found] == [[2, 2, 4, 4]] * 4
    assert [each[1] for each in found] == [[[0, 1], [0, 2]], [[0, 1], [1, 3]], [[2, 3], [0, 2]], [[2, 3], [1, 3]]]


def of_split_layers(plan):
    from trainfleet.mesh import Mesh

    with Mesh.from_env(plan, device="cpu") as mesh:
        assert mesh.torch.mesh_dim_names == ("dp_replicate", "dp_shard", "tp")
        assert mesh.world_size == mesh.world.size == 4 and mesh.world.rank == mesh.rank
        return tuple(group.exchange(mesh.rank) for group in (mesh["tp"], mesh["dp_shard"], mesh.data_axes, mesh.world))


@pytest.mark.parametrize(
    ("plan", "shards"), [(Plan(tp=2), False), (Plan(tp=2, zero=3), True), (Plan(tp=4), False)], ids=str
)
def test_ranks_that_share_layers_sit_side_by_side_and_see_the_same_data(ranks, plan, shards):
    for rank, (layers, sharded, data, world) in enumerate(ranks(4, of_split_layers, plan)):
        first = rank // plan.tp * plan.tp
        assert layers == list(range(first, first + plan.tp))
        assert data == list(range(rank % plan.tp, 4, plan.tp))
        assert sharded == (data if shards else [rank])
        assert world == [0, 1, 2, 3]


REOPENED = """
import torch
from torch.distributed.tensor import DTensor, Replicate
from trainfleet import Mesh, Plan

def misses():
    with Mesh.from_env(Plan(zero=1), device="cpu") as mesh:
        array = DTensor.from_local(torch.ones(2), mesh.torch["dp_shard"], [Replicate()])
        before = torch._C._get_DTensor_sharding_propagator_cache_stats()[1]
        array + 1
        array + 1
        return torch._C._get_DTensor_sharding_propagator_cache_stats()[1] - before

print(misses(), misses())
"""


def test_torch_remembers_nothing_of_a_mesh_that_was_closed():
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run([sys.executable, "-c", REOPENED], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["1", "1"], done.stdout + done.stderr
