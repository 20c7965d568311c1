from __future__ import annotations

import dataclasses
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainfleet.errors import PlanError
from trainfleet.plan import LossScale, Plan

degrees = st.none() | st.integers(1, 8)


@given(st.integers(0, 3), degrees, degrees, st.integers(1, 16))
def test_degrees_fill_the_world_exactly_or_the_plan_is_refused(zero, replicate, shard, world_size):
    try:
        plan = Plan(zero=zero, dp_replicate=replicate, dp_shard=shard).for_world(world_size)  # type: ignore[arg-type]
    except PlanError as error:
        assert str(error).endswith((".", "processes."))
        return
    assert plan.dp_replicate is not None and plan.dp_shard is not None
    assert plan.dp_replicate * plan.dp_shard == world_size
    assert replicate in (None, plan.dp_replicate) and shard in (None, plan.dp_shard)
    assert zero > 0 or plan.dp_shard == 1
    assert plan.for_world(world_size) == plan


@pytest.mark.parametrize(
    ("plan", "world_size", "degrees"),
    [
        (Plan(), 4, (4, 1)),
        (Plan(zero=2), 4, (1, 4)),
        (Plan(zero=3, dp_replicate=2), 8, (2, 4)),
        (Plan(zero=3, dp_shard=2), 8, (4, 2)),
        (Plan(zero=1), 1, (1, 1)),
    ],
)
def test_a_degree_left_out_takes_what_the_world_leaves(plan, world_size, degrees):
    filled = plan.for_world(world_size)
    assert (filled.dp_replicate, filled.dp_shard) == degrees


def test_a_four_way_split_on_two_processes_names_both_numbers_and_a_remedy():
    with pytest.raises(PlanError, match=r"plan\.dp_shard=4 does not divide the 2 processes.*Use one of \[1, 2\]"):
        Plan(zero=3, dp_shard=4).for_world(2)
    with pytest.raises(PlanError, match=r"2 x 2 = 4 processes, but there are 8\. Start 4"):
        Plan(zero=3, dp_replicate=2, dp_shard=2).for_world(8)


def test_tensor_and_pipeline_degrees_leave_the_rest_to_data():
    assert Plan(tp=2, pp=2).for_world(8).dp_replicate == 2
    assert Plan(zero=2, tp=2).for_world(8).dp_shard == 4
    assert str(Plan(tp=2, pp=2).for_world(4)) == "zero=0 dp_replicate=1 dp_shard=1 tp=2 pp=2 1f1b fp32"
    with pytest.raises(PlanError, match=r"plan\.tp=4 does not divide the 2 processes"):
        Plan(tp=4).for_world(2)
    with pytest.raises(PlanError, match=r"dp_replicate x dp_shard x tp = 4 x 1 x 2 = 8 processes.*are 4"):
        Plan(dp_replicate=4, tp=2).for_world(4)


def test_experts_are_dealt_out_over_ranks_that_see_different_data():
    assert Plan(ep=2).for_world(4).dp_replicate == 4
    with pytest.raises(PlanError, match=r"plan\.ep=4 does not divide the 2 places that 4 .* multiple of 8"):
        Plan(ep=4, tp=2).for_world(4)


def test_the_fewest_ranks_are_those_on_which_every_degree_shows():
    plans = (Plan(), Plan(zero=3), Plan(tp=2, pp=2), Plan(zero=2, dp_shard=2, cp=2, tp=2), Plan(ep=4), Plan(tp=4, ep=2))
    assert [plan.fewest_ranks() for plan in plans] == [2, 2, 4, 8, 4, 8]


def test_a_pipeline_has_as_many_stages_as_its_schedule_wants():
    assert [Plan(pp=2, schedule=each).num_stages for each in ("gpipe", "1f1b", "interleaved_1f1b", "zbv")] == [
        2,
        2,
        4,
        4,
    ]
    assert Plan(pp=2, schedule="looped_bfs", stages_per_rank=3).num_stages == 6
    assert Plan(schedule="zbv").num_stages == 1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dp_shard": 0, "zero": 1}, "plan.dp_shard is 0"),
        ({"tp": 0}, "plan.tp is 0"),
        ({"dp_shard": 2}, "plan.zero is 0, which shards nothing"),
        ({"offload": "parameters", "zero": 2}, "Set zero to 3"),
        ({"offload": "optimizer"}, "set zero to 1, 2 or 3"),
        ({"stages": ("blocks.2",)}, "plan.stages is set with plan.pp = 1"),
        ({"stages": ("blocks.2",), "pp": 4}, "names 1 modules.*so there are 2 stages; .* is 4"),
        ({"microbatches": 0}, "plan.microbatches is 0; use at least 1"),
        ({"engine_required": True}, "plan.engine_required is set with plan.engine = 'native'"),
        ({"deepspeed_config": "ds.json"}, "plan.deepspeed_config is set .* Set engine to 'deepspeed'"),
        ({"recompute": "blocks", "recompute_every": 0}, "plan.recompute_every is 0"),
        ({"recompute": "blocks", "recompute_keep": ("mm",)}, "Set recompute to 'selective'"),
        ({"recompute": "blocks", "recompute_budget": 1.5}, "plan.recompute_budget is 1.5"),
        ({"recompute_budget": 0.5}, "Set them to 'blocks' and 1"),
        ({"recompute": "blocks", "recompute_budget": 0.5, "compile": True}, "plan.recompute_budget = 0.5"),
        ({"recompute": "selective", "activations": "offload"}, "Set recompute to 'blocks' or 'none'"),
        ({"recompute": "blocks", "activations": "partition"}, "Set tp to 2 or more"),
        ({"recompute": "blocks", "activations": "partition", "tp": 2, "cp": 2}, "pieces of sequences already"),
        ({"tp_sequence": True}, "Set tp to 2 or more"),
        ({"tp_sequence": True, "tp": 2, "recompute": "selective"}, "Set recompute to 'blocks' or 'none'"),
        ({"tp_sequence": True, "tp": 2, "pp": 2}, "Leave tp_sequence out, or set pp to 1"),
        ({"tp_sequence": True, "tp": 2, "tp_vocabulary": True}, "logits lie in pieces of sequences already"),
        (
            {"tp_sequence": True, "tp": 2, "recompute": "blocks", "activations": "partition"},
            "Set activations to 'keep' or 'offload', or leave tp_sequence out",
        ),
        ({"devices": ("cuda:0", "cuda:1"), "zero": 1}, "plan.devices deals blocks out over 2 devices"),
        ({"devices": ("cuda:0", "cuda:1"), "pp": 2}, "plan.pp = 2"),
    ],
)
def test_a_plan_that_cannot_work_is_refused_when_made(settings, said):
    with pytest.raises(PlanError, match=said):
        Plan(**settings)


@pytest.mark.parametrize("settings", [{"initial": 0.5}, {"minimum": 0}, {"initial": -1, "minimum": -2}, {"window": 0}])
def test_a_loss_scale_that_cannot_work_is_refused(settings):
    with pytest.raises(PlanError, match=r"plan\.loss_scale\."):
        LossScale(**settings)


def test_a_plan_is_a_value():
    plan = Plan(zero=3, precision="bf16")
    assert pickle.loads(pickle.dumps(plan)) == plan and hash(plan) == hash(Plan(zero=3, precision="bf16"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.zero = 1  # type: ignore[misc]


def test_a_plan_in_one_line_says_what_is_not_usual():
    assert str(Plan()) == "zero=0 fp32"
    plan = Plan(zero=3, precision="bf16", recompute="blocks", offload="parameters", compile=True).for_world(4)
    assert str(plan) == "zero=3 dp_replicate=1 dp_shard=4 bf16 recompute=blocks offload=parameters compile"
    assert str(Plan(recompute="selective", recompute_every=2)) == "zero=0 fp32 recompute=selective/2"
