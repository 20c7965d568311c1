"""A checkpoint of a pipeline loads under any other plan, and one of any other plan into a pipeline, to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from models import MODELS  # noqa: E402
from oracle import whole  # noqa: E402
from rank_pool import RankPools  # noqa: E402
from split_models import build, loss, tokens  # noqa: E402

from trainfleet.checkpoint import Checkpointer  # noqa: E402
from trainfleet.mesh import Mesh  # noqa: E402
from trainfleet.parallel import Ema, make_engine, parallelize  # noqa: E402
from trainfleet.parallel.deferred import deferred  # noqa: E402
from trainfleet.parallel.optimizers import build_optimizer  # noqa: E402
from trainfleet.parallel.replicas import check_replicas  # noqa: E402
from trainfleet.plan import Plan  # noqa: E402
from trainfleet.store import FileStore  # noqa: E402

TIED = MODELS["recurrent"]
"""Its embedding is its output matrix, at the other end of the pipeline."""


class Run:
    def __init__(self, model: str, plan: Plan, mesh: Mesh, folder: str, *, is_deferred: bool = False) -> None:
        self.mesh, self.is_tied = mesh, model == "tied"
        make = (lambda: TIED.model()) if self.is_tied else (lambda: build("grouped"))
        torch.manual_seed(len(folder))
        self.model = parallelize(deferred(make) if is_deferred else make(), mesh, plan, example=self.batch(0))
        optimizer = build_optimizer("adamw", self.model, lr=5e-3, args={"weight_decay": 0.1, "eps": 1e-3})
        self.engine = make_engine(self.model, optimizer, TIED.loss_fn if self.is_tied else loss)
        self.ema = Ema(self.model, 0.8)
        self.checkpointer = Checkpointer(FileStore(folder), group=mesh.world)

    def batch(self, number: int) -> Any:
        return TIED.micro_batch(0, number) if self.is_tied else tokens(number)

    def states(self) -> dict[str, Any]:
        return {**self.engine.state(), "ema": self.ema}

    def step(self) -> None:
        data = self.mesh.data_axes
        first = self.engine.steps * 4
        self.engine.forward_backward([self.batch(first + i) for i in range(data.rank, 4, data.size)])
        self.engine.clip(0.5)
        self.engine.step()
        self.ema.update()

    def numbers(self) -> dict[str, np.ndarray]:
        """Of the stages of this rank."""
        found = {name: whole(parameter).numpy() for name, parameter in self.model.named_parameters()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.engine.optimizer.state[parameter].items():
                found[f"{name}.{key}"] = whole(value).numpy()
        with self.ema.applied():
            found |= {f"ema {name}": whole(p).numpy() for name, p in self.model.named_parameters()}
        return found


def saved(model: str, plan: Plan, folder: str, is_deferred: bool) -> dict[str, np.ndarray]:
    with Mesh.from_env(plan) as mesh:
        run = Run(model, plan, mesh, folder, is_deferred=is_deferred)
        for _ in range(2):
            run.step()
        check_replicas(run.model)
        run.checkpointer.save(2, **run.states())
        run.checkpointer.close()
        return run.numbers()


def loaded(model: str, plan: Plan, folder: str) -> dict[str, np.ndarray]:
    with Mesh.from_env(plan) as mesh:
        run = Run(model, plan, mesh, folder)
        for _ in range(1):
            run.step()  # other numbers, which must go
        assert run.checkpointer.restore(**run.states()) == 2
        assert run.engine.steps == 2
        found = run.numbers()
        check_replicas(run.model)
        run.step()
        return found


WAYS = [
    ("tied", 2, Plan(pp=2), 1, Plan()),
    ("tied", 1, Plan(), 2, Plan(pp=2)),
    ("split", 4, Plan(pp=2, tp=2), 2, Plan(zero=3)),
    ("tied", 4, Plan(pp=2, zero=3), 2, Plan(pp=2, schedule="zbv")),
    ("tied", 2, Plan(pp=2, schedule="interleaved_1f1b"), 2, Plan(zero=2)),
    ("split", 8, Plan(pp=2, tp=2, zero=3), 1, Plan()),
    ("split", 8, Plan(pp=2, tp=2, zero=1, blocks=("blocks.*",)), 3, Plan(pp=3)),
    ("split", 1, Plan(), 8, Plan(pp=2, tp=2, zero=2)),
    ("split", 4, Plan(tp=2, zero=3), 4, Plan(pp=2, zero=3)),
    ("split", 4, Plan(pp=2, cp=2, zero=3), 2, Plan(pp=2)),
    ("split", 1, Plan(), 8, Plan(pp=2, cp=2, zero=2)),
]


def check(ranks: RankPools, folder: str, way: Any, is_deferred: bool) -> None:
    model, size, plan, other_size, other = way
    expected: dict[str, np.ndarray] = {}
    for found in ranks(size, saved, model, plan, folder, is_deferred):
        assert all(np.array_equal(found[name], expected[name]) for name in set(found) & set(expected))
        expected |= found
    seen = set()
    for found in ranks(other_size, loaded, model, other, folder):
        different = [name for name in found if not np.array_equal(found[name], expected[name])]
        assert not different, f"{plan} -> {other}: {different}"
        seen |= set(found)
    assert sorted(seen) == sorted(expected)


@pytest.mark.parametrize("way", WAYS[:2], ids=str)
def test_saved_by_a_pipeline_it_loads_in_one_process_and_back(ranks: RankPools, tmp_path: Any, way: Any) -> None:
    check(ranks, str(tmp_path), way, False)


@pytest.mark.matrix
@pytest.mark.parametrize("is_deferred", [False, True], ids=["plain", "deferred"])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_every_way_from_plan_to_plan(ranks: RankPools, tmp_path: Any, way: Any, is_deferred: bool) -> None:
    check(ranks, str(tmp_path), way, is_deferred)
