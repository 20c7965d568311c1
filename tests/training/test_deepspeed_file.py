"""What a DeepSpeed file says of batch, clipping and optimizer stands in the recipe, or is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainfleet.data import BatchConfig
from trainfleet.errors import PlanError
from trainfleet.plan import Plan
from trainfleet.training.deepspeed_file import with_deepspeed_file
from trainfleet.training.recipe import OptimizerConfig, Recipe, TrainConfig


def recipe_with(folder: Path, content: dict[str, Any], **sections: Any) -> Recipe:
    pytest.importorskip("torch")
    file = folder / "ds.json"
    file.write_text(json.dumps(content))
    return Recipe(plan=Plan(engine="deepspeed", deepspeed_config=str(file)), **sections)


FILE = {
    "train_batch_size": 32,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": 0.5,
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "Adam", "params": {"lr": 1e-4, "betas": [0.9, 0.95], "weight_decay": 0.1, "eps": "auto"}},
}


def test_a_file_stands_for_several_sections(tmp_path: Path) -> None:
    recipe = with_deepspeed_file(recipe_with(tmp_path, FILE))
    assert recipe.batch == BatchConfig(global_batch=32, micro_batch=4)
    assert recipe.batch.resolve(2) == (4, 4, 32)
    assert (recipe.train.clip_norm, recipe.plan.zero) == (0.5, 2)
    # There, Adam means AdamW unless told otherwise.
    assert recipe.optimizer == OptimizerConfig(name="adamw", lr=1e-4, args={"betas": [0.9, 0.95], "weight_decay": 0.1})
    coupled = {"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}, "gradient_clipping": 0}
    recipe = with_deepspeed_file(recipe_with(tmp_path, coupled))
    assert (recipe.optimizer.name, recipe.train.clip_norm) == ("adam", None)


def test_contradictions_are_refused_with_both_values(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"batch.micro_batch is 8, and .* says 4"):
        with_deepspeed_file(recipe_with(tmp_path, FILE, batch=BatchConfig(micro_batch=8)))
    with pytest.raises(PlanError, match=r"train.clip_norm is 2.0, and .* says 0.5"):
        with_deepspeed_file(recipe_with(tmp_path, FILE, train=TrainConfig(clip_norm=2.0)))


def test_optimizers_of_deepspeeds_own_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="'OneBitAdam', which is DeepSpeed's own"):
        with_deepspeed_file(recipe_with(tmp_path, {"optimizer": {"type": "OneBitAdam"}}))
    with pytest.raises(PlanError, match="says 'bias_correction' of the optimizer"):
        params = {"bias_correction": False}
        with_deepspeed_file(recipe_with(tmp_path, {"optimizer": {"type": "Adam", "params": params}}))


def test_a_recipe_without_a_file_is_left_as_it_is() -> None:
    recipe = Recipe()
    assert with_deepspeed_file(recipe) is recipe
