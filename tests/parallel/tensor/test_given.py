"""What the plan says of layers beats what the model says, and that beats structure; a wrong word costs no result."""

from __future__ import annotations

import functools

import pytest
import torch
from oracle import hold
from rank_pool import RankPools
from split_models import adamw, build, loss, tokens
from torch import nn

from trainfleet.errors import PlanError
from trainfleet.mesh import Mesh
from trainfleet.parallel import parallelize
from trainfleet.parallel.spread import spread_of
from trainfleet.parallel.tensor.find import find_regions
from trainfleet.plan import Plan
from trainfleet.training.proof.case import Case


def sides(model, **said):
    regions = find_regions(model, 2, **said)
    return {n for r in regions for n in r.columns}, {n for r in regions for n in r.rows}


def test_the_plan_beats_structure_layer_by_layer():
    model = build("perceptron")
    columns, rows = sides(model, columns=["blocks.0.parts.0.down"], rows=["blocks.0.parts.*.up"])
    assert columns == {"blocks.0.parts.0.down", "blocks.1.parts.0.up"}
    assert rows == {"blocks.0.parts.0.up", "blocks.1.parts.0.down"}
    sources = {region.name: region.source for region in find_regions(model, 2, columns=["blocks.0.parts.0.up"])}
    assert sources["blocks.0.parts.0.up"] == "plan.tp_columns and plan.tp_rows"
    assert sources["blocks.1.parts.0"] == "structure"


def test_what_stays_whole_beats_what_is_split():
    columns, rows = sides(
        build("perceptron"), whole=["blocks.0"], columns=["blocks.*.parts.*.up"], rows=["*.*.*.*.down"]
    )
    assert (columns, rows) == ({"blocks.1.parts.0.up"}, {"blocks.1.parts.0.down"})


def test_a_layer_without_a_partner_is_a_region_of_its_own():
    regions = {r.name: r for r in find_regions(build("perceptron"), 2, columns=["head"])}
    assert regions["head"].columns == ("head",) and regions["head"].rows == ()


class Inner(nn.Module):
    base_model_prefix = "model"

    def __init__(self, plan: dict[str, str]) -> None:
        super().__init__()
        self.model = build("perceptron")
        self._tp_plan = plan


def test_the_plan_of_the_model_beats_structure_and_loses_to_the_plan():
    of_model = {f"model.blocks.*.parts.*.{name}": "rowwise" for name in ("up",)}
    of_model |= {"model.blocks.*.parts.*.down": "colwise", "model.norm": "sequence_parallel", "model.tokens": "other"}
    columns, rows = sides(Inner(of_model))
    assert {name.rsplit(".")[-1] for name in columns} == {"down"} and {n.rsplit(".")[-1] for n in rows} == {"up"}
    columns, _ = sides(Inner(of_model), columns=["model.blocks.0.parts.0.up"])
    assert "model.blocks.0.parts.0.up" in columns


def test_a_gathered_layer_of_the_model_that_does_not_divide_stays_whole():
    model = Inner({"model.head": "colwise_gather_output"})
    assert "model.head" in sides(model)[0]
    model.model.head = nn.Linear(16, 17)
    assert "model.head" not in sides(model)[0]


def test_llama_of_transformers_is_split_as_it_says():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4
    )
    model = transformers.LlamaForCausalLM(config)
    regions = {region.name: region for region in find_regions(model, 2)}
    assert {"model.layers.0.self_attn", "model.layers.0.mlp", "model.layers.1.self_attn", "lm_head"} <= set(regions)
    assert {region.source for region in regions.values()} == {"the model's own tp_plan"}
    assert regions["model.layers.0.mlp"].rows == ("model.layers.0.mlp.down_proj",)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            {"columns": ["norm"]},
            r"plan\.tp_columns names 'norm', and norm is a LayerNorm, which is no linear layer or conv",
        ),
        ({"rows": ["Nobody"]}, r"plan\.tp_rows names 'Nobody', but no module"),
        ({"rows": ["head"], "columns": ["head"]}, r"head is named by both plan\.tp_columns and plan\.tp_rows"),
    ],
)
def test_what_names_no_layer_or_one_twice_is_refused_with_the_name(said, told):
    with pytest.raises(PlanError, match=told):
        sides(build("perceptron"), **said)


def test_what_is_tied_to_something_else_is_refused_where_the_plan_names_it():
    model = build("perceptron")
    model.head.weight = model.tokens.weight
    with pytest.raises(PlanError, match=r"plan\.tp_columns and plan\.tp_rows split head, .* shares a parameter"):
        sides(model, columns=["head"])


def wrong(name: str) -> Plan:
    """Every layer the other way round."""
    ways = {
        "perceptron": Plan(tp=2, tp_rows=("blocks.*.parts.*.up", "head"), tp_columns=("blocks.*.parts.*.down",)),
        "grouped": Plan(tp=2, tp_rows=("blocks.*.parts.*.[qv]", "blocks.*.parts.*.up"), tp_columns=("head",)),
        "fused": Plan(tp=2, tp_rows=("Linear",)),
    }
    return ways[name]


@pytest.mark.parametrize("name", ["perceptron", "grouped", "fused"])
def test_a_wrong_plan_costs_time_and_never_the_result(ranks: RankPools, name: str) -> None:
    case = Case(
        build=functools.partial(build, name), loss_fn=loss, micro_batch=tokens, optimizer=adamw, steps=2, clip_norm=0.5
    )
    hold(ranks, 2, case, [wrong(name), Plan(**{**_fields(wrong(name)), "zero": 3})])


def _fields(plan: Plan) -> dict[str, object]:
    return {name: getattr(plan, name) for name in ("tp", "tp_rows", "tp_columns")}


def told() -> str:
    with Mesh.from_env(Plan(tp=2)) as mesh:
        torch.manual_seed(0)
        model = parallelize(build("perceptron"), mesh, Plan(tp=2, tp_columns=("blocks.0.parts.0.up",)))
        return str(spread_of(model).split)


def test_the_line_says_from_where_it_is_known(ranks: RankPools) -> None:
    assert all("(from plan.tp_columns and plan.tp_rows, structure)" in line for line in ranks(2, told))
