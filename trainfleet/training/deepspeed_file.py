"""A DeepSpeed JSON file as a part of a recipe: what it says of batch, clipping, optimizer and plan."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from trainfleet.errors import PlanError
from trainfleet.training.recipe import OptimizerConfig, Recipe, TrainConfig

_OPTIMIZER_WORDS = ("betas", "eps", "weight_decay", "momentum", "nesterov", "dampening", "amsgrad")
_BATCH_WORDS = {
    "train_batch_size": "global_batch",
    "train_micro_batch_size_per_gpu": "micro_batch",
    "gradient_accumulation_steps": "accumulation",
}


def with_deepspeed_file(recipe: Recipe) -> Recipe:
    """The recipe, with what plan.deepspeed_config says where the recipe has its defaults.

    PlanError, with both values, where the two contradict each other, and for what the recipe has no word for.
    """
    path = recipe.plan.deepspeed_config
    if path is None:
        return recipe
    from trainfleet.parallel.deepspeed.config import AUTO, filled, plan_with_file, read

    content = read(path)
    clip = content.get("gradient_clipping", AUTO)
    clipping = {} if clip == AUTO else {"clip_norm": float(clip) or None}
    batch = {ours: content[name] for name, ours in _BATCH_WORDS.items() if content.get(name, AUTO) != AUTO}
    section = content.get("optimizer", AUTO)
    optimizer = _optimizer(section, path) if isinstance(section, dict) else {}
    return replace(
        recipe,
        plan=plan_with_file(recipe.plan),
        train=filled(recipe.train, clipping, TrainConfig(), section="train", path=path),
        batch=filled(recipe.batch, batch, type(recipe.batch)(), section="batch", path=path),
        optimizer=filled(recipe.optimizer, optimizer, OptimizerConfig(), section="optimizer", path=path),
    )


def _optimizer(section: dict[str, Any], path: str) -> dict[str, Any]:
    """The recipe's words for DeepSpeed's optimizer, which is torch's here."""
    from trainfleet.parallel.deepspeed.config import AUTO, refuse_stray

    given = {name: value for name, value in section.get("params", {}).items() if value != AUTO}
    kind = str(section.get("type", "AdamW")).lower()
    decoupled = given.pop("adam_w_mode", True)
    if kind == "adam" and decoupled:  # there, it is AdamW unless told otherwise
        kind = "adamw"
    if kind not in ("adam", "adamw", "sgd"):
        raise PlanError(
            f"{path} names the optimizer {section.get('type')!r}, which is DeepSpeed's own. "
            "Use Adam, AdamW or SGD there, or leave it out and set optimizer.name."
        )
    given.pop("torch_adam", None)
    said: dict[str, Any] = {"name": kind}
    if "lr" in given:
        said["lr"] = float(given.pop("lr"))
    args = {name: given.pop(name) for name in _OPTIMIZER_WORDS if name in given}
    refuse_stray(given, path, "the optimizer")
    return {**said, "args": args} if args else said
