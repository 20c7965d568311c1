"""What DeepSpeed is told: the plan in its words, and what a JSON file of the user's adds; what such a file says of a
plan.

A file may say what a plan says too: stage, precision, offload. It fills in what the plan leaves at its default, and
is refused where the two contradict each other.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from trainfleet.errors import PlanError
from trainfleet.plan import LossScale, Plan

logger = logging.getLogger(__name__)

AUTO = "auto"
"""In files written for other launchers: whoever reads them knows the value."""

MOST_IN_A_BUCKET = 500_000_000
"""Elements that DeepSpeed by itself takes memory for in each bucket, 2 GB, however small the model."""

OURS = {
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "fp16",
    "bf16",
    "bfloat16",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "steps_per_print",
}
"""Keys that the recipe takes over. The loop takes care of these, so DeepSpeed hears its own values of them."""

ELSEWHERE = {
    "scheduler": "Say it in the recipe's section schedule",
    "amp": "Set plan.precision",
    "torch_autocast": "Set plan.precision",
    "tensor_parallel": "Set plan.tp with plan.engine=native",
    "sequence_parallel_size": "Set plan.cp with plan.engine=native",
    "pipeline": "Set plan.pp with plan.engine=native",
    "hybrid_engine": "Leave it out",
    "curriculum_learning": "Let the data source order its samples",
    "data_efficiency": "Let the data source order its samples",
    "autotuning": "Leave it out",
    "elasticity": "Start with --max-restarts",
    "compression_training": "Leave it out",
}
"""Keys of what is not DeepSpeed's here, with what to do instead."""


def settings(plan: Plan, num_elements: int = MOST_IN_A_BUCKET) -> dict[str, Any]:
    """The dictionary that DeepSpeed gets for `plan` and a model of `num_elements`, with what else its file says.

    Precision, loss scale, clipping and accumulation are not in it: they are done around DeepSpeed, with the numbers of
    every other engine. So it always trains float32 parameters, of which plan.precision computes with narrow casts.
    """
    given = read(plan.deepspeed_config) if plan.deepspeed_config else {}
    zero = {name: value for name, value in given.pop("zero_optimization", {}).items() if value != AUTO}
    zero["stage"] = plan.zero
    if plan.zero:
        for name in ("reduce_bucket_size", "allgather_bucket_size"):
            zero.setdefault(name, min(num_elements, MOST_IN_A_BUCKET))
    if plan.offload == "none":
        zero.pop("offload_optimizer", None)
        zero.pop("offload_param", None)
        if plan.zero in (1, 2):
            zero["compute_grad_norm"] = False  # `clip` measures it
    else:
        zero["offload_optimizer"] = {"device": "cpu", **_without_auto(zero.get("offload_optimizer"))}
        if plan.offload == "parameters":
            zero["offload_param"] = {"device": "cpu", **_without_auto(zero.get("offload_param"))}
    return {
        **{name: value for name, value in given.items() if value != AUTO and name not in OURS},
        "train_micro_batch_size_per_gpu": 1,  # counts samples for its own reports, which nobody reads
        # Above 1 the gradients offloaded by one micro-batch are added to by the next.
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }


def read(path: str) -> dict[str, Any]:
    """The content of a DeepSpeed JSON file; PlanError where it is none, or asks for what is not DeepSpeed's here."""
    try:
        content = json.loads(Path(path).expanduser().read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise PlanError(f"plan.deepspeed_config is {path!r}, which cannot be read: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("zero_optimization", {}), dict):
        raise PlanError(f"plan.deepspeed_config is {path!r}, which is no DeepSpeed configuration: no JSON object.")
    for name, remedy in ELSEWHERE.items():
        if is_asked_for(content.get(name)):
            raise PlanError(f"{path} has a section {name!r}, which is not left to DeepSpeed here. {remedy}.")
    return content


def is_asked_for(section: Any) -> bool:
    """Whether a section of a file wants anything: not where it is missing, empty, `auto` or switched off."""
    if isinstance(section, Mapping):
        return bool(section) and section.get("enabled", True) is not False
    return section not in (None, False, AUTO, 1)


def plan_with_file(plan: Plan) -> Plan:
    """The plan, with what its DeepSpeed file says where the plan has its defaults; PlanError where they contradict."""
    if plan.deepspeed_config is None:
        return plan
    content = read(plan.deepspeed_config)
    said: dict[str, Any] = {}
    zero = content.get("zero_optimization", {})
    if (stage := zero.get("stage", AUTO)) != AUTO:
        if stage not in (0, 1, 2, 3):
            raise PlanError(f"{plan.deepspeed_config} says zero_optimization.stage={stage!r}; use 0, 1, 2 or 3.")
        said["zero"] = stage
    if (offload := _offload(zero, plan.deepspeed_config)) is not None:
        said["offload"] = offload
    for name, precision in (("bf16", "bf16"), ("bfloat16", "bf16"), ("fp16", "fp16")):
        if isinstance(section := content.get(name), dict) and section.get("enabled") is True:
            said["precision"] = precision
    if said.get("precision") == "fp16":
        said |= _loss_scale(content["fp16"])
    made: Plan = filled(plan, said, Plan(), section="plan", path=plan.deepspeed_config)
    return made


def filled(settings: Any, said: Mapping[str, Any], defaults: Any, *, section: str, path: str) -> Any:
    """`settings` with the values that a file said where `settings` has those of `defaults`.

    PlanError with both values where it has others, and with the file's alone where they cannot be.
    """
    new: dict[str, Any] = {}
    names = {field.name for field in fields(settings)}
    for name, value in said.items():
        assert name in names
        ours = getattr(settings, name)
        if ours not in (getattr(defaults, name), value):
            raise PlanError(
                f"{section}.{name} is {ours!r}, and {path} says {value!r}. Leave one of them out, or make them agree."
            )
        new[name] = value
    return replace(settings, **new)


def _offload(zero: Mapping[str, Any], path: str) -> str | None:
    devices = {}
    for name in ("offload_optimizer", "offload_param"):
        device = (zero.get(name) or {}).get("device", "none")
        if device not in ("none", "cpu", AUTO):
            raise PlanError(f"{path} says {name}.device={device!r}; what is offloaded goes to 'cpu' here.")
        devices[name] = device == "cpu"
    if devices["offload_param"]:
        return "parameters"
    return "optimizer" if devices["offload_optimizer"] else None


def _loss_scale(section: Mapping[str, Any]) -> dict[str, LossScale]:
    given = {name: value for name, value in section.items() if value != AUTO}
    if given.get("hysteresis", 1) != 1:
        logger.warning(
            "fp16.hysteresis is %s in the DeepSpeed file; here the loss scale halves at each overflow.",
            given["hysteresis"],
        )
    if fixed := given.get("loss_scale", 0):
        return {"loss_scale": LossScale(initial=float(fixed), minimum=min(1.0, float(fixed)), fixed=True)}
    scale = LossScale(
        initial=float(2 ** given.get("initial_scale_power", 16)),
        window=given.get("loss_scale_window", LossScale().window),
        minimum=float(given.get("min_loss_scale", LossScale().minimum)),
    )
    return {"loss_scale": scale} if scale != LossScale() else {}


def _without_auto(section: Any) -> dict[str, Any]:
    return {name: value for name, value in (section or {}).items() if value != AUTO}


def refuse_stray(names: Iterable[str], path: str, what: str) -> None:
    """PlanError where a file says more of `what` than can be taken over."""
    if stray := sorted(names):
        raise PlanError(f"{path} says {stray[0]!r} of {what}, which the recipe has no word for. Leave it out.")
