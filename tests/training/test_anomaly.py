"""What must not be learned from is seen, and the run goes back to before it, a bounded number of times."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainfleet.errors import ConfigError
from trainfleet.events import Evaluated, Event, Noted, Restored, StepEnded
from trainfleet.mesh import Mesh
from trainfleet.parallel import parallelize
from trainfleet.plan import Plan
from trainfleet.training.anomaly import Anomalies
from trainfleet.training.recipe import TrainConfig
from trainfleet.training.trainer import Trainer
from trainfleet.training.watcher import UnderWay


def seen_in(watch: Anomalies, loss: float, norm: float = 1.0, scale: float | None = None) -> str | None:
    """The engine is of no interest."""
    under_way = UnderWay(step=1, micro_batches=[], engine=None, loss=loss, grad_norm=norm, loss_scale=scale)  # type: ignore[arg-type]
    judgement = watch.judge(under_way)
    return judgement and judgement.what


@pytest.mark.parametrize(
    ("loss", "norm", "scale", "said"),
    [
        (math.nan, 1.0, None, "The loss is nan"),
        (math.inf, 1.0, 8.0, "The loss is inf"),
        (1.0, math.inf, None, "The norm of the gradient is inf"),
        (1.0, math.inf, 8.0, None),
        (1e9, 1.0, None, None),
    ],
)
def test_what_is_not_finite_is_seen(loss: float, norm: float, scale: float | None, said: str | None) -> None:
    assert seen_in(Anomalies(TrainConfig()), loss, norm, scale) == said


def test_a_jump_is_seen_once_the_usual_is_known() -> None:
    watch = Anomalies(TrainConfig(rollback_spike=3.0))
    assert seen_in(watch, 90.0) is None
    for _ in range(12):
        assert seen_in(watch, 2.0) is None
    assert seen_in(watch, 5.9) is None
    assert seen_in(watch, 6.1) == "The loss is 6.1, 3.0 times the usual 2"


@pytest.mark.parametrize("wrong", [{"rollback_every": 0}, {"rollback_spike": 1.0}, {"max_rollbacks": -1}])
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        TrainConfig(**wrong)


class Seen:
    def __init__(self) -> None:
        self.losses: dict[int, float] = {}
        self.back: list[int] = []

    def on_event(self, event: Event) -> None:
        if isinstance(event, StepEnded):
            self.losses[event.step] = event.loss
        if isinstance(event, Restored):
            self.back.append(event.step)


def losses_of(batches: list[Tensor], steps: int, every: int | None) -> tuple[dict[int, float], list[int], Tensor]:
    with Mesh.from_env(Plan(), device="cpu") as mesh:
        torch.manual_seed(0)
        model = parallelize(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.2)), mesh, Plan())
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        seen = Seen()
        config = TrainConfig(rollback_every=every)
        trainer = Trainer(
            model, optimizer, lambda out, _: out.square().mean(), batches, mesh=mesh, config=config, observers=[seen]
        )
        trainer.fit(steps)
        return seen.losses, seen.back, torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_run_with_bad_batches_is_the_run_without_them(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    good = [torch.randn(2, 3, generator=draw) for _ in range(12)]
    bad = torch.full((2, 3), math.nan)
    # A copy is taken after each step, so exactly the bad batches are left out.
    plain, _, expected = losses_of(good, 12, None)
    found, back, parameters = losses_of([*good[:5], bad, *good[5:9], bad, bad, *good[9:]], 12, 1)
    assert back == [5, 9, 9] and found == plain
    assert torch.equal(parameters, expected)


def test_what_was_done_before_a_rollback_is_not_done_again() -> None:
    told: list[Event] = []

    class Told:
        on_event = staticmethod(told.append)

    batches = [torch.ones(2, 3), torch.full((2, 3), math.nan), torch.ones(2, 3)]
    with Mesh.from_env(Plan(), device="cpu") as mesh:
        model = parallelize(nn.Linear(3, 3), mesh, Plan())
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        config = TrainConfig(rollback_every=1, evaluate_every=1)
        trainer = Trainer(
            model,
            optimizer,
            lambda out, _: out.square().mean(),
            batches,
            mesh=mesh,
            config=config,
            evaluation=lambda: [torch.ones(2, 3)],
            observers=[Told()],
        )
        trainer.fit(2)
    (note,) = [event for event in told if isinstance(event, Noted) and event.title == "rollback"]
    assert note.text == "The loss is nan in step 2; back to step 1"
    assert [event.step for event in told if isinstance(event, Evaluated)] == [1, 2]
