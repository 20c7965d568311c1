"""Runs in which nothing is wrong are told of no anomaly; `make matrix` takes them further."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="a run needs torch")

from rank_pool import RankPools  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from trainfleet.config import load_config  # noqa: E402
from trainfleet.events import AnomalyOver, AnomalySeen, Event  # noqa: E402
from trainfleet.training.job import Given, run  # noqa: E402
from trainfleet.training.recipe import Recipe  # noqa: E402

RECIPES = Path(__file__).parents[2] / "recipes"


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(16 * 16, 10)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Pictures:
    """Handwritten digits in float32, with margins that are always black."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        self.x = torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
        self.y = torch.tensor(labels)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input": self.x[index], "target": self.y[index]}


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = [layer for _ in range(4) for layer in (nn.Linear(64, 64), nn.ReLU())]
        self.layers = nn.Sequential(nn.Flatten(), *layers, nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Heard:
    """What the run tells."""

    in_loop = True

    def __init__(self) -> None:
        self.events: list[Event] = []

    def on_event(self, event: Event) -> None:
        self.events.append(event)


def clean(folder: str, values: dict[str, Any], model: type[nn.Module], num_busy: int = 0) -> list[str]:
    """All that is told of anomalies with the settings as they come, but looks at units each 10 steps."""
    torch.manual_seed(0)
    heard = Heard()
    quiet = {"console": False, "tensorboard": False, "curve": False, "anomalies": {"dead_every": 10}}
    given = Given(model=model(), source=Pictures(), evaluation_source=Pictures(), observers=[heard])
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(num_busy)]
    try:
        run(load_config(Recipe, values={"folder": folder, "monitor": quiet, **values}, env={}).value, given)
    finally:
        for other in others:
            other.kill()
            other.wait()
    return told_of(heard)


def told_of(heard: Heard) -> list[str]:
    return [f"{event.step}: {event.what}" for event in heard.events if isinstance(event, AnomalySeen | AnomalyOver)]


def steps(few: int, many: int) -> list[Any]:
    return [few, pytest.param(many, marks=pytest.mark.matrix)]


@pytest.mark.parametrize("steps", steps(80, 2000))
def test_a_conv_net_with_batch_statistics_is_clean(ranks: RankPools, tmp_path: Path, steps: int) -> None:
    values = {"batch": {"micro_batch": 16}, "train": {"steps": steps}, "optimizer": {"lr": 1e-2}}
    assert ranks(1, clean, str(tmp_path), values, ConvNet, deadline_seconds=900.0) == [[]]


@pytest.mark.matrix
@pytest.mark.parametrize("steps", [8000])
def test_a_noisy_tiny_batch_is_clean(ranks: RankPools, tmp_path: Path, steps: int) -> None:
    values = {"batch": {"micro_batch": 1}, "train": {"steps": steps}, "optimizer": {"lr": 1e-3}}
    assert ranks(1, clean, str(tmp_path), values, Deep, deadline_seconds=900.0) == [[]]


@pytest.mark.parametrize("steps", steps(150, 2000))
def test_a_warm_up_to_a_high_rate_is_clean(ranks: RankPools, tmp_path: Path, steps: int) -> None:
    values = {
        "batch": {"micro_batch": 16},
        "train": {"steps": steps},
        "optimizer": {"name": "sgd", "lr": 0.1, "args": {"momentum": 0.9}},
        "schedule": {"name": "cosine", "warmup_steps": steps // 3},
    }
    assert ranks(1, clean, str(tmp_path), values, Deep, deadline_seconds=900.0) == [[]]


@pytest.mark.matrix
def test_evaluations_and_saves_at_every_turn_on_a_busy_machine_are_clean(ranks: RankPools, tmp_path: Path) -> None:
    values = {
        "batch": {"micro_batch": 16},
        "train": {"steps": 400, "evaluate_every": 3, "evaluate_batches": 2},
        "checkpoint": {"every": 4, "keep_last": 2},
    }
    assert ranks(1, clean, str(tmp_path), values, ConvNet, 2, deadline_seconds=900.0) == [[]]


def gpt_run(folder: str, steps: int) -> list[str]:
    sys.path.insert(0, str(RECIPES))
    overrides = [f"train.steps={steps}", "train.finish=null", "train.evaluate_every=50", "train.evaluate_batches=2"]
    overrides += [f"folder={folder}", "monitor.console=false", "monitor.curve=false", "monitor.tensorboard=false"]
    heard = Heard()
    recipe = load_config(Recipe, file=RECIPES / "gpt_stdlib.yaml", overrides=overrides, env={}).value
    run(recipe, Given(observers=[heard]))
    return told_of(heard)


@pytest.mark.matrix
def test_the_gpt_of_the_recipes_on_two_ranks_is_clean(ranks: RankPools, tmp_path: Path) -> None:
    assert ranks(2, gpt_run, str(tmp_path), 300, deadline_seconds=1200.0) == [[], []]
