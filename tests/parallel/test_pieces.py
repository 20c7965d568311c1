"""What a run saved goes on at any number of ranks and any stage; taking the state changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import named, whole
from rank_pool import RankPools
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainfleet.checkpoint import Checkpointer
from trainfleet.errors import CheckpointError
from trainfleet.loss import LossSum
from trainfleet.mesh import Mesh
from trainfleet.parallel import Ema, NativeEngine, parallelize
from trainfleet.parallel.joined_optimizer import JoinedOptimizer
from trainfleet.parallel.pieces import ModelState, OptimizerState, as_piece
from trainfleet.plan import LossScale, Plan
from trainfleet.store import FileStore

MICRO_BATCHES = 12
"""Of a step, over all ranks."""


class Model(nn.Module):
    """Scalars, buffers, a tied weight, a part that comes into use at step 4, one that never does, extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 7)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(7, 7), nn.Tanh()) for _ in range(2))
        self.blocks[1][0].weight = self.blocks[0][0].weight
        self.late = nn.Linear(7, 7)
        self.never = nn.Linear(7, 3)
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.note = "fresh"

    def forward(self, input: Tensor, step: Tensor) -> Tensor:
        self.seen += len(input)
        x = self.stem(input)
        for block in self.blocks:
            x = x + block(x)
        return self.gain * (self.late(x) if step >= 3 else x)

    def get_extra_state(self) -> dict[str, str]:
        return {"note": self.note}

    def set_extra_state(self, state: dict[str, str]) -> None:
        self.note = state["note"]


def loss_fn(output: Tensor, batch: dict[str, Tensor]) -> LossSum:
    return LossSum((output - 1).square().sum(), len(output))


def call(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    return model(batch["input"], batch["step"])


def joined(model: nn.Module) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    return JoinedOptimizer(
        torch.optim.SGD(matrices, lr=1e-2, momentum=0.9, dampening=0.5, weight_decay=0.1),
        torch.optim.Adam(others, lr=1e-2, weight_decay=0.1, eps=1e-4),
    )


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4, fused=True)


OPTIMIZERS = {"joined": joined, "adamw": adamw}


class Run:
    """An engine with an average, on this rank."""

    def __init__(self, mesh: Mesh, plan: Plan, optimizer: str, folder: str) -> None:
        torch.manual_seed(0)
        self.mesh = mesh
        self.model = parallelize(Model(), mesh, plan)
        self.engine = NativeEngine(self.model, OPTIMIZERS[optimizer](self.model), loss_fn, forward=call)
        self.ema = Ema(self.model, 0.8)
        self.checkpointer = Checkpointer(FileStore(folder), group=mesh.data_axes)

    def states(self) -> dict[str, Any]:
        return {**self.engine.state(), "ema": self.ema}

    def step(self) -> bool:
        count = MICRO_BATCHES // self.mesh.world_size
        step = self.engine.steps
        self.engine.forward_backward(
            [batch(step, i * self.mesh.world_size + self.mesh.data_axes.rank) for i in range(count)]
        )
        self.engine.clip(1.0)
        updated = self.engine.step()
        self.ema.update()
        return updated

    def numbers(self) -> dict[str, Tensor]:
        found = {name: whole(tensor) for name, tensor in named(self.model)}
        with self.ema.applied():
            found |= {f"ema {name}": whole(tensor) for name, tensor in self.model.named_parameters()}
        return found


def batch(step: int, number: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + number)
    return {"input": torch.randn(2 + number % 2, 5, generator=generator), "step": torch.tensor(step)}


def save_and_go_on(plan: Plan, optimizer: str, folder: str) -> dict[str, Tensor]:
    with Mesh.from_env(plan) as mesh:
        run = Run(mesh, plan, optimizer, folder)
        for _ in range(2):
            run.step()
        run.model.note = "trained"
        run.checkpointer.save(2, **run.states())
        run.checkpointer.close()
        for _ in range(3):
            run.step()
        return run.numbers()


def load_and_go_on(plan: Plan, optimizer: str, folder: str) -> dict[str, Tensor]:
    with Mesh.from_env(plan) as mesh:
        run = Run(mesh, plan, optimizer, folder)
        assert run.checkpointer.restore(**run.states()) == 2
        assert run.model.note == "trained" and run.engine.steps == 2
        for _ in range(3):
            run.step()
        return run.numbers()


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    # Each rank has counted its own samples.
    return max(float((a[name] - b[name]).abs().max()) for name in a if name not in ("buffer seen",))


@pytest.mark.parametrize("optimizer", ["joined", pytest.param("adamw", marks=pytest.mark.matrix)])
def test_saved_on_four_ranks_goes_on_anywhere(ranks: RankPools, tmp_path: Path, optimizer: str) -> None:
    expected = ranks(4, save_and_go_on, Plan(zero=3), optimizer, str(tmp_path))[0]
    untouched = ranks(1, train_only, optimizer)[0]
    assert largest_difference(expected, untouched) < 1e-5, "sharded and saved"
    for size, plan in (
        (1, Plan()),
        (2, Plan(zero=1)),
        (3, Plan(zero=2)),
        (4, Plan(zero=3, dp_replicate=2)),
        (2, Plan(zero=3, offload="parameters")),
    ):
        found = ranks(size, load_and_go_on, plan, optimizer, str(tmp_path))[0]
        assert largest_difference(expected, found) < 1e-5, f"{size} ranks, {plan}"


def train_only(optimizer: str) -> dict[str, Tensor]:
    with Mesh.from_env(Plan()) as mesh:
        run = Run(mesh, Plan(), optimizer, "unused")
        for _ in range(5):
            run.step()
        return run.numbers()


@pytest.mark.parametrize(
    "plan",
    [
        Plan(zero=2, offload="optimizer"),
        Plan(precision="fp16", loss_scale=LossScale(initial=2.0**20, window=2)),
        Plan(zero=3, precision="bf16", recompute="blocks"),
    ],
    ids=str,
)
def test_a_resume_on_as_many_ranks_is_equal_to_the_bit(ranks: RankPools, tmp_path: Path, plan: Plan) -> None:
    gone_on = ranks(2, save_and_go_on, plan, "adamw", str(tmp_path))
    resumed = ranks(2, load_and_go_on, plan, "adamw", str(tmp_path))
    for a, b in zip(gone_on, resumed):
        assert a.keys() == b.keys()
        assert [name for name in a if not torch.equal(a[name], b[name]) and name != "buffer seen"] == []


def scaled() -> list[Any]:
    plan = Plan(precision="fp16", loss_scale=LossScale(initial=2.0**20, window=2))
    with Mesh.from_env(plan) as mesh:
        run = Run(mesh, plan, "adamw", "unused")
        outcomes = [run.step() for _ in range(3)]
        states = {name: state.state_dict() for name, state in run.states().items()}
        again = Run(mesh, plan, "adamw", "unused")
        for name, state in again.states().items():
            state.load_state_dict(states[name])
        return [outcomes, run.engine.loss_scale, again.engine.loss_scale, again.states()["engine"].state_dict()]


def test_the_scale_of_fp16_is_kept(ranks: RankPools) -> None:
    outcomes, scale, again, state = ranks(1, scaled)[0]
    assert False in outcomes, "the run began with an overflow"
    assert scale == again < 2.0**20 and state["loss_scale"]["scale"] == scale


def disturbed(zero: int) -> bool:
    with Mesh.from_env(Plan(zero=zero)) as mesh:
        found = []
        for takes_states in (False, True):
            run = Run(mesh, Plan(zero=zero), "joined", "unused")
            schedule = torch.optim.lr_scheduler.StepLR(run.engine.optimizer, 1, 0.5)  # it wraps optimizer.step
            for _ in range(5):
                if takes_states:
                    for state in run.states().values():
                        state.state_dict()
                run.step()
                schedule.step()
            started = OptimizerState(run.model, run.engine.optimizer).state_dict()["started"]
            assert "never.weight" not in started and "late.weight" in started
            found.append(run.numbers())
        return all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_taking_the_state_changes_nothing(ranks: RankPools) -> None:
    assert ranks(2, disturbed, 0) == [True, True]
    assert ranks(2, disturbed, 3) == [True, True]


def unstarted() -> list[Any]:
    with Mesh.from_env(Plan(zero=3)) as mesh:
        run = Run(mesh, Plan(zero=3), "adamw", "unused")
        before = OptimizerState(run.model, run.engine.optimizer)
        fresh = before.state_dict()
        run.step()
        before.load_state_dict(fresh)
        memory = fresh["memory"]["stem.weight"]
        return [
            fresh["started"],
            len(run.engine.optimizer.state),
            [float(memory[key].local.abs().sum()) for key in ("exp_avg", "exp_avg_sq")],
            memory["exp_avg"].global_shape,
            memory["exp_avg"].local.shape == run.model.stem.weight.to_local().shape,
        ]


def test_memory_that_was_never_made_is_taken_away_again(ranks: RankPools) -> None:
    for found in ranks(2, unstarted):
        assert found == [[], 0, [0.0, 0.0], (7, 5), True]


def described() -> dict[str, Any]:
    with Mesh.from_env(Plan(zero=3, dp_replicate=2, dp_shard=2)) as mesh:
        model = parallelize(nn.Linear(3, 3), mesh, Plan(zero=3, dp_replicate=2, dp_shard=2))
        weight = as_piece("weight", model.weight)
        whole_one = as_piece("gain", torch.tensor(1.0), mesh=mesh)
        state = ModelState(model).state_dict()
        assert isinstance(model.weight, DTensor)
        return {
            "place": (weight.global_shape, weight.offsets, weight.shape, weight.replica),
            "whole": (whole_one.offsets, whole_one.replica),
            "shares memory": state["weight"].local.data_ptr() == model.weight.to_local().data_ptr(),
        }


def test_a_piece_knows_its_place_and_which_copy_it_is(ranks: RankPools) -> None:
    found = ranks(4, described)
    assert [each["place"] for each in found] == [
        ((3, 3), (0, 0), (2, 3), 0),
        ((3, 3), (2, 0), (1, 3), 0),
        ((3, 3), (0, 0), (2, 3), 1),
        ((3, 3), (2, 0), (1, 3), 1),
    ]
    assert [each["whole"] for each in found] == [((), rank) for rank in range(4)]
    assert all(each["shares memory"] for each in found)


def foreign() -> None:
    with Mesh.from_env(Plan()) as mesh:
        model = parallelize(nn.Linear(3, 3), mesh, Plan())
        OptimizerState(model, torch.optim.SGD(nn.Linear(3, 3).parameters(), lr=1.0))


def test_an_optimizer_of_another_model_is_refused(ranks: RankPools) -> None:
    with pytest.raises(CheckpointError, match="2 tensors that are not parameters of the model"):
        ranks(1, foreign)
