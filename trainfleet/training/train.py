"""train: one call from a model, a dataset and a plain dictionary."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trainfleet.batch import Batch
from trainfleet.config import load_config
from trainfleet.errors import ConfigError
from trainfleet.events import Observer
from trainfleet.training.job import Given, run
from trainfleet.training.outcome import Outcome
from trainfleet.training.recipe import Recipe

if TYPE_CHECKING:
    from torch import nn

FLAT_NAMES: dict[str, str] = {
    "batch_size": "batch.micro_batch",
    "train_micro_batch_size_per_gpu": "batch.micro_batch",
    "train_batch_size": "batch.global_batch",
    "gradient_accumulation_steps": "batch.accumulation",
    "learning_rate": "optimizer.lr",
    "weight_decay": "optimizer.args.weight_decay",
    "zero_stage": "plan.zero",
    "fp16": "plan.precision",
    "bf16": "plan.precision",
    "offload_optimizer": "plan.offload",
    "offload_param": "plan.offload",
    "activation_checkpointing": "plan.recompute",
    "gradient_clipping": "train.clip_norm",
    "steps": "train.steps",
    "epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "seed": "train.seed",
    "save_dir": "folder",
    "save_interval": "checkpoint.every",
    "checkpoint_interval": "checkpoint.every",
    "keep_checkpoints": "checkpoint.keep_last",
    "save_function": "checkpoint.save_function",
    "log_interval": "monitor.log_interval",
    "auto_resume": "checkpoint.resume",
    "max_retries": "train.max_retries",
    "max_retry_attempts": "train.max_retries",
    "num_workers": "data.workers",
    "loss": "loss",
}
"""Names that people know from other systems, and the recipe's key that each stands for."""

SWITCHES: dict[str, str] = {
    "fp16": "fp16",
    "bf16": "bf16",
    "offload_optimizer": "optimizer",
    "offload_param": "parameters",
    "activation_checkpointing": "blocks",
}
"""Those that are switched on and off there, and the value that "on" has here."""


def train(
    model: nn.Module | Callable[[], nn.Module],
    dataset: Any,
    config: Mapping[str, Any] | None = None,
    *,
    evaluation: Any = None,
    loss_fn: Callable[[Any, Batch], Any] | None = None,
    observers: Sequence[Observer] = (),
) -> Outcome:
    """Train `model` on `dataset`, as `config` says, on the ranks that a launcher started or on this process.

    `config` holds the recipe's sections (`{"plan": {"zero": 2}}`), its dotted keys (`{"plan.zero": 2}`), or the flat
    names of FLAT_NAMES (`{"zero_stage": 2}`), mixed as you like; two of them for one key are refused.
    Without a batch size, 32 samples a rank. The model is trained in place.
    """
    values = recipe_values(config or {})
    values.setdefault("batch", {"micro_batch": 32})
    recipe = load_config(Recipe, values=values).value
    given = Given(model=model, source=dataset, evaluation_source=evaluation, loss_fn=loss_fn, observers=observers)
    return run(recipe, given)


def recipe_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """Any mixture of sections, dotted keys and flat names as the nested values of a recipe."""
    values: dict[str, Any] = {}
    said: dict[str, str] = {}
    for name, value in config.items():
        key = FLAT_NAMES.get(name, name)
        if name in SWITCHES:
            with_parameters = name == "offload_optimizer" and _is_on("offload_param", config.get("offload_param"))
            if not _is_on(name, value) or with_parameters:
                continue  # with the parameters, the optimizer's state is offloaded too
            value = SWITCHES[name]
        if name == "auto_resume" and isinstance(value, bool):
            value = "auto" if value else "never"
        for path, leaf in _leaves(key.split("."), value):
            dotted = ".".join(path)
            if dotted in said:
                raise ConfigError(
                    f"The config says {dotted} twice: as {said[dotted]!r} and as {name!r}. Leave one out."
                )
            said[dotted] = name
            _put(values, path, leaf)
    return values


def _is_on(name: str, value: Any) -> bool:
    """Of True, `{"enabled": True}`, `{"device": "cpu"}` and "cpu", as configurations elsewhere have it."""
    if isinstance(value, Mapping):
        for key, detail in value.items():
            if key not in ("enabled", "device", "pin_memory") and detail:
                raise ConfigError(
                    f"The config says {name}.{key}={detail!r}, which has no such short form here. Leave it out, or use "
                    "the recipe's own keys: `trainfleet config docs` lists them."
                )
        value = value.get("enabled", value.get("device", True))
    return value not in (None, False, "none")


def _leaves(path: list[str], value: Any) -> list[tuple[list[str], Any]]:
    if isinstance(value, Mapping) and value and path[-1] != "args":
        return [leaf for name, below in value.items() for leaf in _leaves([*path, str(name)], below)]
    return [(path, value)]


def _put(values: dict[str, Any], path: list[str], leaf: Any) -> None:
    for part in path[:-1]:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise ConfigError(f"The config gives {'.'.join(path)} and also a value for {part!r} as a whole.")
    values[path[-1]] = {**values[path[-1]], **leaf} if isinstance(values.get(path[-1]), dict) else leaf
