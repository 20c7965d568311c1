"""All that the next step depends on comes back: a run that fell goes on as the one that did not, to the bit."""

from __future__ import annotations

import multiprocessing
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="a run needs torch")

from killed_run import same, states_at  # noqa: E402
from rank_pool import RankPools  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from trainfleet.config import load_config  # noqa: E402
from trainfleet.events import Event, StepEnded  # noqa: E402
from trainfleet.training.job import Given, run  # noqa: E402
from trainfleet.training.recipe import Recipe  # noqa: E402

SAMPLES, STEPS = 80, 20  # 2 ranks x 2 micro-batches x 2 samples: an epoch is 10 steps


class Learner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.3), nn.Tanh(), nn.BatchNorm1d(16), nn.Linear(16, 1))

    def forward(self, x: Tensor) -> Tensor:
        # Of generators that nobody seeds anew in each step.
        return self.layers(x + 0.1 * (random.random() + np.random.random()))  # type: ignore[no-any-return]


class Numbers:
    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x = torch.sin(torch.arange(4.0) * (index + 1))
        return {"input": x, "label": x.sum(0, keepdim=True)}


class Diary:
    """A user's observer with a state of its own: numbers, an array, and draws of torch's generator."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.mean = np.zeros(1)
        self.drawn = torch.zeros(2)

    def on_event(self, event: Event) -> None:
        if isinstance(event, StepEnded):
            self.steps.append(event.step)
            self.mean += (event.loss - self.mean) / len(self.steps)
            self.drawn += torch.rand(2)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": list(self.steps), "mean": self.mean, "drawn": self.drawn}

    def load_state_dict(self, state: Any, /) -> None:
        self.steps, self.mean, self.drawn = list(state["steps"]), state["mean"], state["drawn"]


class Falls:
    """Raises before step `at` + 1."""

    at: int | None = None

    def __call__(self, engine: Any, micro_batches: Any) -> Any:
        if engine.steps == self.at:
            raise KeyError("fallen")
        return engine.forward_backward(micro_batches)


falls = Falls()


def train(folder: str, at: int | None, values: dict[str, Any]) -> list[int]:
    """On a rank: train, until it falls; the steps that the diary knows of."""
    recipe = {
        "folder": folder,
        "batch": {"micro_batch": 2, "accumulation": 2},
        "data": {"workers": 2},
        "loss": "mse",
        "optimizer": {"name": "adamw", "lr": 0.05},
        "schedule": {"name": "cosine", "warmup_steps": 4},
        "train": {
            "steps": STEPS,
            "ema_decay": 0.8,
            "evaluate_every": 3,
            "early_stopping": 100,
            "step_fn": f"{__name__}:falls",
        },
        "checkpoint": {"every": 1, "keep_last": 100},
        "monitor": {"console": False, "tensorboard": False, "curve": False},
        **values,
    }
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # may have data workers
    random.seed()  # what an interpreter brings along must not matter
    np.random.seed(None)
    torch.seed()
    Falls.at = at
    diary = Diary()
    given = Given(model=Learner, source=Numbers(), evaluation_source=Numbers(), observers=[diary])
    try:
        run(load_config(Recipe, values=recipe, env={}).value, given)
    except KeyError:
        assert at is not None
    return diary.steps


PLANS: dict[str, dict[str, Any]] = {
    "fp16, zero 0": {"precision": "fp16", "zero": 0, "loss_scale": {"initial": 2.0**18, "window": 3}},
    "fp32, zero 2": {"zero": 2},
    "bf16, zero 3": {"precision": "bf16", "zero": 3},
}
PLACES = {"in the middle of an epoch": 7, "at the edge of an epoch": 10, "before the last step": STEPS - 1}


def check(ranks: RankPools, tmp_path: Path, plan: str, fallen: list[int]) -> None:
    values = {"plan": PLANS[plan]}
    whole, broken = tmp_path / "whole" / "run", tmp_path / "broken" / "run"
    expected = ranks(2, train, str(whole), None, values)
    assert expected == [list(range(1, STEPS + 1))] * 2
    for at in fallen:
        ranks(2, train, str(broken), at, values)
    assert ranks(2, train, str(broken), None, values) == expected
    for step in range(1, STEPS + 1):
        found, known = states_at(broken.parent, step), states_at(whole.parent, step)
        assert known.keys() >= {"model", "optimizer", "engine", "trainer", "generators", "data", "ema", "Diary"}
        assert [name for name in known if not same(found.get(name), known[name])] == [], f"step {step}"


def test_fp16_with_all_that_has_a_state_goes_on_to_the_bit(ranks: RankPools, tmp_path: Path) -> None:
    check(ranks, tmp_path, "fp16, zero 0", list(PLACES.values()))


@pytest.mark.matrix
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("place", PLACES)
def test_every_place_under_every_plan_goes_on_to_the_bit(
    ranks: RankPools, tmp_path: Path, plan: str, place: str
) -> None:
    check(ranks, tmp_path, plan, [PLACES[place]])
