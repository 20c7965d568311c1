"""deal_out: give this rank its stages of a model, which is cut in place."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import nn

from trainfleet.batch import Batch, call_with_batch, cut_batch
from trainfleet.errors import PlanError
from trainfleet.mesh import Mesh
from trainfleet.parallel.experts.apply import by_shape
from trainfleet.parallel.pipeline.cut import is_held
from trainfleet.parallel.pipeline.pipe import Pipeline
from trainfleet.parallel.pipeline.record import record
from trainfleet.parallel.pipeline.schedules import stages_per_rank
from trainfleet.parallel.pipeline.shadow import Shadow
from trainfleet.parallel.pipeline.stages import divide, leaf_names
from trainfleet.parallel.precision import cast_compute
from trainfleet.parallel.recompute import stop_caching
from trainfleet.parallel.tensor import Split, find_regions, split_regions
from trainfleet.parallel.tensor.find import named
from trainfleet.parallel.tensor.vocabulary import vocabulary_regions
from trainfleet.plan import Plan

logger = logging.getLogger(__name__)


def deal_out(model: nn.Module, blocks: Sequence[nn.Module], mesh: Mesh, plan: Plan, example: Batch | None) -> Pipeline:
    """Cut `model` to the stages of this rank, in place, as a forward of `example` (a micro-batch) shows.

    Raises PlanError, before anything is changed, where the forward cannot be followed or has too few modules.
    """
    if example is None:
        raise PlanError(
            f"plan.pp is {plan.pp}, and a pipeline must see what its stages hand on. Give a micro-batch: "
            "parallelize(model, mesh, plan, example=batch)."
        )
    count = plan.pp * stages_per_rank(plan)
    leaves = leaf_names(model, blocks, plan.stages)
    stop_caching(model)  # keys and values of the past are objects that no stage could hand on
    whole = _kept_whole(model, leaves, plan) if plan.tp > 1 else ()
    given = {"columns": plan.tp_columns, "rows": plan.tp_rows}
    regions = find_regions(model, plan.tp, whole, **given) if plan.tp > 1 else []
    of_tokens = vocabulary_regions(model, plan.tp, regions, named(model, whole)) if _splits_tokens(plan) else []
    shadow = Shadow(model, mesh.device)
    by_shape(shadow.model)
    cast_compute(shadow.model, plan, torch.device(mesh.device).type)
    shadow.watch(leaves)
    shadow.model.train()
    graph = record(shadow, call_with_batch, cut_batch(example, plan.microbatches)[0])
    stages = divide(graph, shadow.model, leaves, count, plan.stages)
    pipeline = Pipeline(model, shadow, stages, mesh, plan, regions=regions, of_tokens=of_tokens)
    _refuse_untrained(pipeline)
    pipeline.cut()
    if mesh.is_main:
        logger.info("%s", described(pipeline))
    return pipeline


def _splits_tokens(plan: Plan) -> bool:
    return plan.tp > 1 and plan.tp_vocabulary


def _kept_whole(model: nn.Module, leaves: Sequence[str], plan: Plan) -> tuple[str, ...]:
    """What tensor parallelism leaves whole: besides plan.tp_whole, layers between which a stage may begin."""
    wide = [
        layer
        for region in find_regions(model, plan.tp, plan.tp_whole, columns=plan.tp_columns, rows=plan.tp_rows)
        if not any(region.name == leaf or region.name.startswith(f"{leaf}.") for leaf in leaves)
        for layer in (*region.columns, *region.rows)
    ]
    if wide:
        logger.info("Stages may begin between %s, so plan.tp does not split them.", ", ".join(wide))
    return (*plan.tp_whole, *wide)


def split_stages(pipeline: Pipeline, mesh: Mesh, plan: Plan) -> Split | None:
    """Split the layers of the stages that this rank holds over tensor-parallel ranks; None where there are none."""
    regions, of_tokens = (
        [region for region in each if is_held(pipeline.model, region.name)]
        for each in (pipeline.regions, pipeline.of_tokens)
    )
    if not regions and not of_tokens:
        return None
    return split_regions(pipeline.model, mesh.sharding["tp"], regions, of_tokens)


def described(pipeline: Pipeline) -> str:
    """Where each stage begins, for people."""
    first: dict[int, str] = {}
    for name, stage in pipeline.stages.homes.items():
        first.setdefault(stage, name)
    begins = ", ".join(f"{stage} with {first[stage]}" for stage in sorted(first))
    tied = pipeline.tied()
    return f"Pipeline of {pipeline.stages.count} stages on {pipeline.plan.pp} ranks: {begins}" + (
        f"; tied between stages: {', '.join(tied)}" if tied else ""
    )


def _refuse_untrained(pipeline: Pipeline) -> None:
    """PlanError where a rank would have nothing to train, for optimizers want parameters."""
    trained = {name for name, p in pipeline.shadow.model.named_parameters() if p.requires_grad}
    for rank in range(pipeline.plan.pp):
        if not any(rank in pipeline.holders(name) for name in trained):
            raise PlanError(
                f"Rank {rank} of plan.pp={pipeline.plan.pp} would hold no parameter that is trained. Move the stages "
                "(plan.stages), or use fewer ranks."
            )
