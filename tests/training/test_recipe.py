"""The recipe's own sections refuse what cannot be, and scale the rate only when asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainfleet.config import load_config, to_yaml
from trainfleet.errors import ConfigError
from trainfleet.training.recipe import OptimizerConfig, Recipe, TrainConfig

RECIPES = Path(__file__).parents[2] / "recipes"


def test_the_rate_follows_the_global_batch_only_where_a_reference_is_given() -> None:
    assert OptimizerConfig(lr=1e-3).rate_for(4096) == 1e-3
    assert OptimizerConfig(lr=1e-3, lr_reference_batch=256).rate_for(1024) == pytest.approx(4e-3)
    assert OptimizerConfig(lr=1e-3, lr_reference_batch=256, lr_scaling="sqrt").rate_for(1024) == pytest.approx(2e-3)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"steps": 0}, "train.steps is 0"),
        ({"epochs": 0}, "train.epochs is 0"),
        ({"steps": 5, "epochs": 2}, "train.steps is 5 and train.epochs 2; give one of them"),
        ({"evaluate_every": 0}, "train.evaluate_every is 0"),
        ({"clip_norm": 0.0}, "train.clip_norm is 0.0"),
        ({"ema_decay": 1.0}, "train.ema_decay is 1.0"),
    ],
)
def test_impossible_settings_of_the_loop_are_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        TrainConfig(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_loads_and_survives_being_written(recipe: Path, tmp_path: Path) -> None:
    loaded = load_config(Recipe, file=recipe, env={}).value
    written = tmp_path / "recipe.yaml"
    written.write_text(to_yaml(loaded))
    assert load_config(Recipe, file=written, env={}).value == loaded


def test_a_wrong_key_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.lr"):
        load_config(Recipe, overrides=["optimizer.lrr=1"], env={})


class Batches:
    batches_per_epoch = 7


def test_epochs_become_steps_of_which_the_last_is_filled_up() -> None:
    assert TrainConfig(epochs=3).steps_of(Batches(), accumulation=2) == 11
    assert TrainConfig(steps=5).steps_of(Batches(), accumulation=2) == 5
    assert TrainConfig().steps_of([], accumulation=1) == 1000


def test_epochs_of_data_without_a_length_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"train.epochs is 2, but the training data does not know its length"):
        TrainConfig(epochs=2).steps_of(iter([]), accumulation=1)
