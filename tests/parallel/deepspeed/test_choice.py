"""Where DeepSpeed is missing our own engine runs the plan, with one warning; or the run is refused before it starts."""

from __future__ import annotations

import logging

import pytest
import torch
from models import MODELS

from trainfleet.errors import DependencyError, PlanError
from trainfleet.mesh import Mesh
from trainfleet.parallel import NativeEngine, make_engine, parallelize
from trainfleet.parallel.deepspeed import choice
from trainfleet.plan import Plan


@pytest.fixture
def without_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "installed", lambda module: None)


def test_where_it_is_missing_our_own_engine_runs_the_same_stage(
    without_deepspeed: None, caplog: pytest.LogCaptureFixture
) -> None:
    plan = Plan(engine="deepspeed", zero=2)
    with Mesh.from_env(plan) as mesh, caplog.at_level(logging.WARNING):
        model = parallelize(MODELS["transformer"].build(0), mesh, plan)
        engine = make_engine(model, torch.optim.AdamW(model.parameters()), MODELS["transformer"].loss_fn)
    assert isinstance(engine, NativeEngine)
    assert (engine.plan.zero, engine.plan.engine) == (2, "native")
    said = [record.message for record in caplog.records if "not installed" in record.message]
    assert len(said) == 1
    assert 'pip install "trainfleet[deepspeed]"' in said[0]


def test_a_plan_that_insists_is_refused(without_deepspeed: None) -> None:
    plan = Plan(engine="deepspeed", engine_required=True)
    with pytest.raises(DependencyError, match="DeepSpeed is not installed") as caught:
        choice.refuse_missing(plan)
    assert "engine_required" in (caught.value.hint or "")
    with Mesh.from_env(plan) as mesh, pytest.raises(DependencyError):
        parallelize(MODELS["transformer"].build(0), mesh, plan)


def test_a_file_that_says_more_than_the_plan_is_taken_over_before_the_mesh(tmp_path) -> None:
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimization": {"stage": 2}}')
    plan = Plan(engine="deepspeed", deepspeed_config=str(file))
    with Mesh.from_env(plan) as mesh, pytest.raises(PlanError, match="plan_with_file"):
        parallelize(MODELS["transformer"].build(0), mesh, plan)


def test_other_axes_are_refused_with_the_engine_that_takes_them() -> None:
    for axis in ("tp", "cp", "pp", "ep"):
        with pytest.raises(PlanError, match=f"plan.{axis} is 2 with plan.engine = 'deepspeed'.*'native'"):
            Plan(engine="deepspeed", **{axis: 2})
    with pytest.raises(PlanError, match="dp_replicate is 2"):
        Plan(engine="deepspeed", zero=2, dp_replicate=2)
