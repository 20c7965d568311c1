"""A run by default hears of anomalies, and goes back to before what it must not learn from where it keeps copies."""

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
from trainfleet.monitor.anomalies import AnomalyConfig
from trainfleet.parallel import parallelize
from trainfleet.plan import Plan
from trainfleet.training.recipe import TrainConfig
from trainfleet.training.trainer import Trainer
from trainfleet.training.watchers.anomalies import anomaly_watchers


def names(config: AnomalyConfig, **options: Any) -> list[str]:
    with Mesh.from_env(Plan(), device="cpu") as mesh:
        return [type(each).__name__ for each in anomaly_watchers(config, mesh, **{"rolls_back": False, **options})]


def test_what_is_not_asked_for_is_not_watched() -> None:
    default = names(AnomalyConfig())
    assert default == ["Findings", "NotFinite", "LossSpike", "GradientExplosion", "DeadUnits", "Stalls"]
    assert names(AnomalyConfig(loss_spike=None, gradient_explosion=None, dead_units=None)) == [
        "Findings",
        "NotFinite",
        "Stalls",
    ]


def test_a_policy_that_cannot_be_kept_is_refused() -> None:
    with pytest.raises(ConfigError, match="gradient_explosion is rollback"):
        names(AnomalyConfig(gradient_explosion="rollback"))


@pytest.mark.parametrize("wrong", [{"rollback_every": 0}, {"max_rollbacks": -1}])
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
    assert note.text == "The loss is nan: The batch holds NaN in its array in step 2; back to step 1"
    assert [event.step for event in told if isinstance(event, Evaluated)] == [1, 2]
