"""A DeepSpeed file fills in what the plan leaves open; DeepSpeed hears the plan; contradictions are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainfleet.errors import PlanError
from trainfleet.parallel.deepspeed.config import plan_with_file, read, settings
from trainfleet.plan import LossScale, Plan


def plan_of(folder: Path, content: dict[str, Any], **fields: Any) -> Plan:
    file = folder / "ds.json"
    file.write_text(json.dumps(content))
    return Plan(engine="deepspeed", deepspeed_config=str(file), **fields)


EVERYWHERE = {
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
    "gradient_clipping": "auto",
    "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 12, "hysteresis": 2},
    "bf16": {"enabled": True},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu"},
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": 10,
        "reduce_bucket_size": 1000,
    },
    "wall_clock_breakdown": False,
}
"""As people have them from other launchers."""


def test_a_file_fills_in_the_plan(tmp_path: Path) -> None:
    plan = plan_with_file(plan_of(tmp_path, EVERYWHERE))
    assert (plan.zero, plan.precision, plan.offload) == (3, "bf16", "parameters")
    assert plan_with_file(plan) == plan
    scaled = {"fp16": {"enabled": True, "initial_scale_power": 10, "loss_scale_window": 7, "min_loss_scale": 2}}
    plan = plan_with_file(plan_of(tmp_path, scaled, zero=1))
    assert (plan.zero, plan.precision) == (1, "fp16")
    assert plan.loss_scale == LossScale(initial=1024.0, window=7, minimum=2.0)
    fixed = plan_with_file(plan_of(tmp_path, {"fp16": {"enabled": True, "loss_scale": 128}}))
    assert fixed.loss_scale == LossScale(initial=128.0, fixed=True)


def test_a_contradiction_is_refused_with_both_values(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"plan.zero is 2, and .*ds.json says 3"):
        plan_with_file(plan_of(tmp_path, EVERYWHERE, zero=2))
    with pytest.raises(PlanError, match=r"plan.precision is 'fp16', and .* says 'bf16'"):
        plan_with_file(plan_of(tmp_path, EVERYWHERE, zero=3, precision="fp16"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"scheduler": {"type": "WarmupLR"}}, "section schedule"),
        ({"tensor_parallel": {"autotp_size": 2}}, "plan.tp"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "'cpu'"),
        ({"zero_optimization": {"stage": 4}}, "0, 1, 2 or 3"),
        ({"zero_optimization": True}, "no DeepSpeed configuration"),
    ],
)
def test_what_is_not_deepspeeds_here_is_refused_with_what_to_do(
    tmp_path: Path, content: dict[str, Any], said: str
) -> None:
    with pytest.raises(PlanError, match=said):
        plan_with_file(plan_of(tmp_path, content))


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot be read"):
        read(str(tmp_path / "missing.json"))
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(PlanError, match="cannot be read"):
        read(str(tmp_path / "broken.json"))


def test_deepspeed_hears_the_plan_and_the_rest_of_the_file(tmp_path: Path) -> None:
    told = settings(plan_with_file(plan_of(tmp_path, EVERYWHERE)))
    zero = told["zero_optimization"]
    assert zero["stage"] == 3
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert (zero["stage3_param_persistence_threshold"], zero["reduce_bucket_size"]) == (10, 1000)
    assert "auto" not in json.dumps(told)
    assert settings(Plan(engine="deepspeed", zero=1), 77)["zero_optimization"]["reduce_bucket_size"] == 77
    assert told["wall_clock_breakdown"] is False
    assert told["gradient_clipping"] == 0.0  # the engine clips, by the norm of all ranks
    assert not {"fp16", "bf16", "optimizer"} & set(told)
