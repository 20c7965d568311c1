"""What can be known of a run without starting it."""

from __future__ import annotations

from dataclasses import replace

from trainfleet.errors import PlanError
from trainfleet.training.deepspeed_file import with_deepspeed_file
from trainfleet.training.job import Given, build_model, close, refuse_schedule
from trainfleet.training.losses import loss_by_name
from trainfleet.training.recipe import Recipe


def check(recipe: Recipe, world_size: int) -> list[str]:
    """What would be trained, in lines for a person; raises what is wrong.

    The plan fits, the batch divides, the model builds (without memory), the data opens, the loss exists.
    """
    from trainfleet.parallel.deepspeed.choice import refuse_missing
    from trainfleet.parallel.deferred import deferred

    recipe = with_deepspeed_file(recipe)
    refuse_missing(recipe.plan)
    plan = recipe.plan.for_world(world_size)
    ranks = plan.data_ranks(world_size)
    micro, accumulation, whole = recipe.batch.resolve(ranks)
    refuse_schedule(plan, accumulation)
    if micro % plan.microbatches:
        raise PlanError(
            f"plan.microbatches is {plan.microbatches}, which does not divide the {micro} samples of a micro-batch. "
            f"Make batch.micro_batch a multiple of {plan.microbatches}."
        )
    model = deferred(lambda: build_model(replace(recipe, model=replace(recipe.model, deferred=False)), Given()))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    loss_by_name(recipe.loss)
    stream = recipe.data.open_training(size=micro, rank=0, world_size=ranks)
    samples = getattr(stream, "num_samples", None)
    steps = recipe.train.steps_of(stream, accumulation)
    next(iter(stream))
    close(stream)
    return [
        f"plan    {plan} on {world_size} process{'es' * (world_size != 1)}",
        f"batch   {whole} samples a step: {micro} in a micro-batch x {accumulation} x {ranks}",
        f"model   {recipe.model.name}: {parameters:,} parameters",
        f"data    {recipe.data.source}" + (f": {samples:,} samples" if samples is not None else ""),
        f"steps   {steps:,}",
        f"folder  {recipe.folder}",
    ]
