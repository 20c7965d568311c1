"""A model's forward in stages, in one process: what tests of the parts of a pipeline share."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from trainfleet.batch import call_with_batch
from trainfleet.parallel.blocks import find_blocks
from trainfleet.parallel.pipeline.graph import Graph, Named
from trainfleet.parallel.pipeline.program import Program
from trainfleet.parallel.pipeline.record import record, tensors_of
from trainfleet.parallel.pipeline.shadow import Shadow
from trainfleet.parallel.pipeline.stages import Stages, divide, leaf_names


def followed(model: nn.Module, batch: Any) -> tuple[Graph, Shadow, list[str]]:
    leaves = leaf_names(model, find_blocks(model))
    shadow = Shadow(model, "cpu")
    shadow.watch(leaves)
    return record(shadow, call_with_batch, batch), shadow, leaves


def in_stages(model: nn.Module, batch: Any, count: int, beginnings: tuple[str, ...] = ()) -> tuple[Program, Stages]:
    leaves = leaf_names(model, find_blocks(model), beginnings)
    shadow = Shadow(model, "cpu")
    shadow.watch(leaves)
    graph = record(shadow, call_with_batch, batch)
    stages = divide(graph, shadow.model, leaves, count, beginnings)
    return Program(graph, shadow.model, stages.homes, count), stages


def run_in_turn(program: Program, model: nn.Module, batch: Any) -> Any:
    """The output of all stages one after the other; each sees nothing but what the one before it sends."""

    def find(what: str | Named) -> Any:
        if isinstance(what, str):
            return model.get_submodule(what)
        owner, _, name = what.name.rpartition(".")
        return getattr(model.get_submodule(owner), name)

    received: dict[int, torch.Tensor] = {}
    output = None
    for part in program.parts:
        ran = program.run(part, find, tensors_of(batch), received)
        received, output = dict(zip(part.sends, ran.tensors, strict=True)), ran.output
    return output
