"""Pipeline: a model whose modules are dealt out to stages, and how it is called."""

from __future__ import annotations

import functools
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainfleet.errors import PlanError
from trainfleet.mesh import Mesh
from trainfleet.parallel.context.handover import Handover
from trainfleet.parallel.pipeline.cut import keep_stages
from trainfleet.parallel.pipeline.graph import Named, is_parameter, signature
from trainfleet.parallel.pipeline.program import Program, Ran
from trainfleet.parallel.pipeline.record import record, tensors_of
from trainfleet.parallel.pipeline.schedules import rank_of_stage
from trainfleet.parallel.pipeline.shadow import Shadow
from trainfleet.parallel.pipeline.stages import EVERYWHERE, Stages
from trainfleet.parallel.tensor.layer import Region
from trainfleet.parallel.torch_private import Leaving
from trainfleet.plan import Plan

logger = logging.getLogger(__name__)

_MOST_PROGRAMS = 64
"""Programs that are kept, one for each combination of shapes and modes; then the oldest goes."""


class Pipeline:
    """What this rank knows of the whole, beside the stages that it holds."""

    def __init__(
        self,
        model: nn.Module,
        shadow: Shadow,
        stages: Stages,
        mesh: Mesh,
        plan: Plan,
        *,
        regions: Sequence[Region] = (),
        of_tokens: Sequence[Region] = (),
    ) -> None:
        self.model, self.shadow, self.stages, self.plan = model, shadow, stages, plan
        self.regions = tuple(regions)
        """The modules, of the whole, whose layers are split over tensor-parallel ranks."""
        self.of_tokens = tuple(of_tokens)
        """The embeddings and heads, of the whole, that are split by tokens over tensor-parallel ranks."""
        self.group = mesh["pp"]
        self.device = mesh.device
        self.ranks = [rank_of_stage(stage, plan) for stage in range(stages.count)]
        """By stage, the rank of the axis pp that holds it."""
        self.held = [stage for stage, rank in enumerate(self.ranks) if rank == self.group.rank]
        self.is_called = False
        """Whether this is a call of the whole model, by somebody who wants its output."""
        self._programs: OrderedDict[Hashable, Program] = OrderedDict()
        self._modules: dict[str, nn.Module] = {}
        names = list(dict(shadow.model.named_parameters()))
        self._order = {name: i for i, name in enumerate(names)}

    @property
    def last_rank(self) -> int:
        """The rank of the axis pp that holds the last stage, and has the loss."""
        return self.ranks[-1]

    def cut(self) -> None:
        """Let the model hold this rank's stages alone, and run as a pipeline where it is called."""
        keep_stages(self.model, self.shadow.model, self.stages, self.held)
        self.model.forward = functools.partial(_forward, self)  # type: ignore[method-assign]

    # what is held where

    def holders(self, parameter: str) -> list[int]:
        """The ranks of the axis pp that hold a parameter; several where it is tied."""
        return sorted({self.ranks[stage] for stage in self.stages.parameters[parameter]})

    def tied(self) -> list[str]:
        """The parameters that several ranks hold, in the order of the model."""
        return [name for name in self._order if len(self.holders(name)) > 1]

    def copy_of(self, name: str) -> int:
        """Which of the equal copies of a parameter or buffer this rank has; 0 for the only one."""
        if name in self.stages.parameters:
            return self.holders(name).index(self.group.rank)
        stages = next((held for leaf, held in self.stages.leaves.items() if name.startswith(f"{leaf}.")), (EVERYWHERE,))
        holders = range(self.group.size) if EVERYWHERE in stages else sorted({self.ranks[stage] for stage in stages})
        return holders.index(self.group.rank)

    def sorted_names(self, names: Sequence[str]) -> list[str]:
        """Names of parameters in the order of the whole model."""
        return sorted(set(names), key=self._order.__getitem__)

    # programs

    def program(self, run: Callable[[Any, Any], Any], inputs: Any) -> Program:
        """What the stages do for `run(model, inputs)`; inputs of the same shapes share it."""
        self._copy_modes()
        flags = tuple(module.training for module in self.shadow.model.modules())
        key = (run, signature(inputs), hash(flags), torch.is_grad_enabled())
        found = self._programs.get(key)
        if found is None:
            graph = record(self.shadow, run, inputs)
            found = Program(graph, self.shadow.model, self.stages.homes, self.stages.count)
            self._refuse_elsewhere(found)
            self._programs[key] = found
            if not found.draws_in_order and self.group.rank == 0:
                logger.warning("The stages draw random numbers in another order than one process would.")
            if len(self._programs) > _MOST_PROGRAMS:
                self._programs.popitem(last=False)
        return found

    def _refuse_elsewhere(self, program: Program) -> None:
        """PlanError where a forward uses something in a stage that, as the example had it, does not hold it."""
        for node, stage in zip(program.graph.nodes, program.placed):
            names = {each.name: self.stages.parameters[each.name] for each in node.reads() if is_parameter(each)}
            if isinstance(node.call, str):
                names[node.call] = self.stages.leaves[node.call]
            for name, holders in names.items():
                if stage not in holders and stage != EVERYWHERE and EVERYWHERE not in holders:
                    raise PlanError(
                        f"{node.where}: stage {stage} of the pipeline would need {name}, which stage {holders[0]} "
                        "holds: this forward takes modules in another order than the one of the example. Give an "
                        "example that takes the same way, name plan.stages so that one stage has them, or set "
                        "plan.pp to 1."
                    )

    def _copy_modes(self) -> None:
        """Let the shadow train where the model does."""
        ours = dict(self.model.named_modules())
        for name, module in self.shadow.model.named_modules():
            if (own := ours.get(name)) is not None:
                module.training = own.training
            else:
                parent = name.rpartition(".")[0]
                module.training = self.shadow.model.get_submodule(parent).training

    def find(self, what: str | Named) -> Any:
        """A module by its name, or a parameter or buffer as it is now."""
        if isinstance(what, str):
            return self._module(what)
        owner, _, name = what.name.rpartition(".")
        return getattr(self._module(owner), name)

    def _module(self, name: str) -> nn.Module:
        if name not in self._modules:
            self._modules[name] = self.model.get_submodule(name)
        return self._modules[name]

    def compute(
        self,
        program: Program,
        stage: int,
        inputs: Any,
        received: Mapping[int, Tensor],
        handover: Handover | None = None,
    ) -> Ran:
        """Run one stage of this rank; with a `handover`, on pieces, of which it receives and gives plain tensors."""
        part, given, kinds = program.parts[stage], tensors_of(inputs), program.graph.kinds

        def run() -> Ran:
            if handover is None:
                return program.run(part, self.find, given, received)
            values = {number: handover.arriving(piece, kinds[number].shape) for number, piece in received.items()}
            ran: Ran = handover.run(functools.partial(program.run, part, self.find, given, values))
            return Ran(tensors=[handover.leaving(tensor) for tensor in ran.tensors], output=ran.output)

        if self.is_called:
            return run()
        given = self.model(Segment(run))
        return Ran(tensors=given, output=None) if isinstance(given, Leaving) else Ran(tensors=[], output=given)


class Segment:
    """What the model is called with to compute one stage, so that its hooks see it: some gather parameters."""

    def __init__(self, run: Callable[[], Ran]) -> None:
        self._run = run

    def compute(self) -> Any:
        """The output of the model where this is the last stage, else what goes to the next."""
        ran = self._run()
        return Leaving(ran.tensors) if ran.output is None else ran.output


def _forward(pipeline: Pipeline, *args: Any, **kwargs: Any) -> Any:
    if args and isinstance(args[0], Segment):
        return args[0].compute()
    from trainfleet.parallel.pipeline.flow import output_of

    return output_of(pipeline, args, kwargs)
