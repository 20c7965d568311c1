"""The small recipe that trains, validates and predicts in seconds learns what it is shown."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn", reason="scikit-learn has the digits, and is not installed")
ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "recipes"))

from handwritten_digits import Digits  # noqa: E402

from trainfleet.config import load_config  # noqa: E402
from trainfleet.training.job import run  # noqa: E402
from trainfleet.training.recipe import Recipe  # noqa: E402


def test_every_fifth_image_is_held_out() -> None:
    training, held_out = Digits(), Digits(held_out=True)
    assert (len(training), len(held_out)) == (1437, 360)
    images = np.stack([held_out[i]["input"] for i in range(360)])
    assert images.dtype == np.uint8 and images.shape == (360, 1, 8, 8) and images.max() == 255
    seen = {training[i]["input"].tobytes() for i in range(len(training))}
    assert sum(image.tobytes() in seen for image in images) == 0


def test_a_third_of_the_run_brings_the_held_out_loss_far_down(tmp_path: Path) -> None:
    quiet: dict[str, Any] = {"console": False, "tensorboard": False, "curve": False}
    overrides = ["train.steps=100", f"folder={tmp_path / 'run'}"]
    recipe = load_config(Recipe, file=ROOT / "recipes/digits.yaml", values={"monitor": quiet}, overrides=overrides)
    outcome = run(recipe.value)
    assert outcome.evaluation is not None and outcome.evaluation < 0.25, "of 2.3 at the start"
