"""A run saved by four processes goes on with fewer, sharded otherwise: as if nothing had happened, no sample lost."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="a run needs torch")

from rank_pool import RankPools  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from trainfleet.config import load_config  # noqa: E402
from trainfleet.errors import CheckpointError  # noqa: E402
from trainfleet.events import Event, StepEnded  # noqa: E402
from trainfleet.training.job import Given, run  # noqa: E402
from trainfleet.training.recipe import Recipe  # noqa: E402

SAMPLES, BATCH = 120, 12
HALF, STEPS = 10, 20  # an epoch each
CELLS = [(ranks, zero) for ranks in (1, 2, 3) for zero in (0, 1, 2)]
CHOSEN = [(1, 0), (2, 2), (3, 1)]


class Learner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(7, 7), nn.Tanh()) for _ in range(3)), nn.Linear(7, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


class Numbers:
    """Remembers which samples it was asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        self.asked.append(index)
        x = torch.sin(torch.arange(7.0) * (index + 1))
        return {"input": x, "label": x.sum(0, keepdim=True)}


class Losses:
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_event(self, event: Event) -> None:
        if isinstance(event, StepEnded):
            self.seen.append(event.loss)


def train(folder: str, steps: int, values: dict[str, Any]) -> tuple[list[float], list[int]]:
    """On a rank: the losses of the steps that were taken, and the samples that this rank saw."""
    recipe = {
        "folder": folder,
        "batch": {"global_batch": BATCH, "accumulation": 1},
        "loss": "mse",
        "optimizer": {"lr": 0.01},
        "schedule": {"name": "constant"},  # a part of the run must not depend on where it will end
        "train": {"steps": steps},
        "checkpoint": {"every": HALF},
        "monitor": {"console": False, "tensorboard": False, "curve": False},
        **values,
    }
    source, losses = Numbers(), Losses()
    run(load_config(Recipe, values=recipe, env={}).value, Given(model=Learner, source=source, observers=[losses]))
    return losses.seen, source.asked


def trained(ranks: RankPools, size: int, folder: Path, steps: int, **values: Any) -> tuple[list[float], list[int]]:
    found = ranks(size, train, str(folder), steps, values)
    return found[0][0], [index for _, asked in found for index in asked]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("interrupted") / "run"


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return []


def check(ranks: RankPools, interrupted: Path, tmp_path: Path, losses: list[float], size: int, zero: int) -> None:
    four = {"plan": {"zero": 3}}
    if not losses:
        losses += trained(ranks, 4, interrupted.parent / "whole", STEPS, **four)[0]
    if not interrupted.exists():
        first, asked = trained(ranks, 4, interrupted, HALF, **four)
        assert first == losses[:HALF] and Counter(asked) == dict.fromkeys(range(SAMPLES), 1)
    shutil.copytree(interrupted, tmp_path / "run")
    second, asked = trained(ranks, size, tmp_path / "run", STEPS, plan={"zero": zero})
    assert len(second) == STEPS - HALF
    for found, expected in zip(second, losses[HALF:]):
        assert math.isclose(found, expected, rel_tol=1e-5)  # sums over other numbers of ranks round otherwise
    assert Counter(asked) == dict.fromkeys(range(SAMPLES), 1), "the second epoch, each sample once"


@pytest.mark.parametrize(("size", "zero"), CHOSEN)
def test_four_ranks_of_zero_3_go_on_as_fewer(
    ranks: RankPools, interrupted: Path, tmp_path: Path, losses: list[float], size: int, zero: int
) -> None:
    check(ranks, interrupted, tmp_path, losses, size, zero)


@pytest.mark.matrix
@pytest.mark.parametrize(("size", "zero"), [cell for cell in CELLS if cell not in CHOSEN])
def test_four_ranks_of_zero_3_go_on_as_any(
    ranks: RankPools, interrupted: Path, tmp_path: Path, losses: list[float], size: int, zero: int
) -> None:
    check(ranks, interrupted, tmp_path, losses, size, zero)


def test_in_the_middle_of_an_epoch_no_sample_is_lost_or_seen_twice(ranks: RankPools, tmp_path: Path) -> None:
    seen: Counter[int] = Counter()
    taken = 0
    for size, steps in ((4, 3), (3, 4), (2, 9), (1, 10)):
        part, asked = trained(ranks, size, tmp_path / "run", steps, checkpoint={"every": 1}, plan={"zero": size - 1})
        taken += len(part)
        seen.update(asked)
    assert taken == HALF and seen == dict.fromkeys(range(SAMPLES), 1)


def test_another_precision_needs_a_word(ranks: RankPools, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    trained(ranks, 2, folder, 2, plan={"zero": 2, "precision": "fp16"})
    with pytest.raises(CheckpointError, match=r"engine/precision is 'fp16' .* and 'bf16' here.*checkpoint.cast=true"):
        trained(ranks, 2, folder, 4, plan={"zero": 2, "precision": "bf16"})
    allowed = {"every": HALF, "cast": True}
    for steps, precision in ((4, "bf16"), (6, "fp32"), (8, "fp16")):
        part, _ = trained(ranks, 2, folder, steps, plan={"zero": 2, "precision": precision}, checkpoint=allowed)
        assert len(part) == 2 and all(map(math.isfinite, part))
