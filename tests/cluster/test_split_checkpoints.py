"""A checkpoint of split layers loads under any other plan, and one of any other plan into split layers, to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from oracle import whole  # noqa: E402
from rank_pool import RankPools  # noqa: E402
from split_models import adamw, build, loss, tokens  # noqa: E402

from trainfleet.checkpoint import Checkpointer  # noqa: E402
from trainfleet.mesh import Mesh  # noqa: E402
from trainfleet.parallel import Ema, NativeEngine, parallelize  # noqa: E402
from trainfleet.parallel.deferred import deferred  # noqa: E402
from trainfleet.parallel.replicas import check_replicas  # noqa: E402
from trainfleet.plan import Plan  # noqa: E402
from trainfleet.store import FileStore  # noqa: E402


class Run:
    def __init__(self, plan: Plan, mesh: Mesh, folder: str, seed: int) -> None:
        torch.manual_seed(seed)
        self.mesh = mesh
        self.model = parallelize(deferred(lambda: build("inline")) if seed % 2 else build("grouped"), mesh, plan)
        self.engine = NativeEngine(self.model, adamw(self.model), loss)
        self.ema = Ema(self.model, 0.8)
        self.checkpointer = Checkpointer(FileStore(folder), group=mesh.world)

    def states(self) -> dict[str, Any]:
        return {**self.engine.state(), "ema": self.ema}

    def step(self) -> None:
        data = self.mesh.data_axes
        first = self.engine.steps * 4
        self.engine.forward_backward([tokens(first + i) for i in range(data.rank, 4, data.size)])
        self.engine.clip(0.5)
        self.engine.step()
        self.ema.update()

    def numbers(self) -> dict[str, np.ndarray]:
        found = {name: whole(parameter).numpy() for name, parameter in self.model.named_parameters()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.engine.optimizer.state[parameter].items():
                found[f"{name}.{key}"] = whole(value).numpy()
        with self.ema.applied():
            found |= {f"ema {name}": whole(p).numpy() for name, p in self.model.named_parameters()}
        return found


def saved(plan: Plan, folder: str, seed: int) -> dict[str, np.ndarray]:
    with Mesh.from_env(plan) as mesh:
        run = Run(plan, mesh, folder, seed)
        for _ in range(2):
            run.step()
        check_replicas(run.model)
        run.checkpointer.save(2, **run.states())
        run.checkpointer.close()
        return run.numbers()


def loaded(plan: Plan, folder: str, seed: int) -> dict[str, np.ndarray]:
    with Mesh.from_env(plan) as mesh:
        run = Run(plan, mesh, folder, seed)
        assert run.checkpointer.restore(**run.states()) == 2
        found = run.numbers()
        check_replicas(run.model)
        run.step()
        return found


WAYS = [
    (2, Plan(tp=2), 1, Plan()),
    (1, Plan(), 2, Plan(tp=2)),
    (2, Plan(tp=2, zero=2), 2, Plan(zero=3)),
    (2, Plan(), 4, Plan(tp=2, zero=3)),
    (4, Plan(tp=2, zero=3), 1, Plan()),
    (4, Plan(tp=2), 4, Plan(tp=4)),
    (4, Plan(tp=2, zero=1), 2, Plan(tp=2)),
    (2, Plan(cp=2, zero=3), 1, Plan()),
    (4, Plan(cp=2, zero=2), 2, Plan(cp=2)),
    (1, Plan(), 4, Plan(cp=2, tp=2)),
    (4, Plan(cp=2, tp=2, zero=3), 4, Plan(tp=2, zero=2)),
]


def check(ranks: RankPools, folder: str, way: Any, seed: int) -> None:
    size, plan, other_size, other = way
    expected = ranks(size, saved, plan, folder, seed)[0]
    for found in ranks(other_size, loaded, other, folder, seed):
        assert sorted(found) == sorted(expected)
        different = [name for name in expected if not np.array_equal(found[name], expected[name])]
        assert not different, f"{plan} -> {other}: {different}"


@pytest.mark.parametrize("way", [*WAYS[1:3], WAYS[7]], ids=str)
def test_saved_under_one_plan_it_loads_under_another(ranks: RankPools, tmp_path: Any, way: Any) -> None:
    check(ranks, str(tmp_path), way, 0)


@pytest.mark.matrix
@pytest.mark.parametrize("seed", [0, 1], ids=["plain", "deferred"])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_every_way_from_plan_to_plan(ranks: RankPools, tmp_path: Any, way: Any, seed: int) -> None:
    check(ranks, str(tmp_path), way, seed)
