"""One call from a dictionary: sections, dotted keys and the names people know, each mapped visibly."""

from __future__ import annotations

from typing import Any

import pytest

from trainfleet.config import load_config
from trainfleet.errors import ConfigError
from trainfleet.training.recipe import Recipe
from trainfleet.training.train import FLAT_NAMES, SWITCHES, recipe_values


def test_every_flat_name_sets_its_key() -> None:
    values: dict[str, Any] = {
        "loss": "mse",
        "save_function": "package.module:function",
        "save_dir": "runs/x",
        "learning_rate": 0.5,
        "gradient_clipping": 0.5,
        "auto_resume": "never",
    }
    for name, key in FLAT_NAMES.items():
        value = True if name in SWITCHES else values.get(name, 1)
        sharded = {"plan.zero": 3} if name.startswith("offload") else {}
        recipe = load_config(Recipe, values=recipe_values({name: value, **sharded}), env={}).value
        found: Any = recipe
        for part in key.split("."):
            found = found[part] if isinstance(found, dict) else getattr(found, part)
        assert found == SWITCHES.get(name, value), name


def test_auto_resume_is_a_choice_of_two() -> None:
    assert recipe_values({"auto_resume": True}) == {"checkpoint": {"resume": "auto"}}
    assert recipe_values({"auto_resume": False}) == {"checkpoint": {"resume": "never"}}


def test_the_names_of_the_issue_are_all_there() -> None:
    known = {
        "batch_size", "learning_rate", "zero_stage", "fp16", "gradient_accumulation_steps", "gradient_clipping",
        "save_dir", "save_interval", "keep_checkpoints", "log_interval", "auto_resume", "max_retries",
    }  # fmt: skip
    assert known <= set(FLAT_NAMES)


def test_sections_dotted_keys_and_flat_names_mix() -> None:
    values = recipe_values({"plan": {"zero": 2}, "plan.precision": "bf16", "weight_decay": 0.1, "optimizer.lr": 1.0})
    assert values == {
        "plan": {"zero": 2, "precision": "bf16"},
        "optimizer": {"args": {"weight_decay": 0.1}, "lr": 1.0},
    }


def test_two_names_for_one_key_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"plan\.zero twice: as 'zero_stage' and as 'plan'"):
        recipe_values({"zero_stage": 1, "plan": {"zero": 2}})


def test_what_is_switched_off_asks_for_nothing() -> None:
    off: dict[str, Any] = {"fp16": False, "offload_param": {"device": "none"}, "offload_optimizer": False}
    off["activation_checkpointing"] = {"enabled": False, "cpu_checkpointing": False}
    assert recipe_values({**off, "bf16": True}) == {"plan": {"precision": "bf16"}}


def test_a_detail_that_has_no_short_form_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"fp16.loss_scale=128, which has no such short form"):
        recipe_values({"fp16": {"enabled": True, "loss_scale": 128}})


@pytest.mark.parametrize("on", [True, "cpu", {"device": "cpu", "pin_memory": True}])
def test_parameters_are_offloaded_with_what_the_optimizer_remembers(on: Any) -> None:
    assert recipe_values({"offload_optimizer": on}) == {"plan": {"offload": "optimizer"}}
    assert recipe_values({"offload_optimizer": on, "offload_param": on}) == {"plan": {"offload": "parameters"}}


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="zero"):
        load_config(Recipe, values=recipe_values({"zero_stages": 2}), env={})


def test_it_trains_a_model_on_a_dataset(tmp_path: Any) -> None:
    torch = pytest.importorskip("torch")
    from trainfleet import train

    torch.manual_seed(0)
    x = torch.randn(256, 8)
    data = torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long())
    model = torch.nn.Linear(8, 2)
    before = model.weight.detach().clone()
    config = {"batch_size": 16, "learning_rate": 0.05, "epochs": 2, "save_dir": str(tmp_path / "run"), "fp16": True}
    outcome = train(model, data, {**config, "monitor": {"console": False, "tensorboard": False, "curve": False}})
    assert outcome.reason == "finished" and outcome.step == 2 * 256 // 16
    assert outcome.loss is not None and outcome.loss < 0.5
    assert not torch.equal(model.weight, before), "in place"
    assert (tmp_path / "run" / "recipe.yaml").exists()
