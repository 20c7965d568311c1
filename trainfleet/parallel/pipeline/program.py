"""Program: what each stage runs of a graph, what it gets from the stage before and what it hands on."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainfleet.errors import PlanError
from trainfleet.parallel.pipeline.graph import Graph, Kind, Modes, Named, Node, Value, references, replaced
from trainfleet.parallel.pipeline.record import tensors_of
from trainfleet.parallel.pipeline.stages import EVERYWHERE, place


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One stage's part of a graph."""

    nodes: tuple[Node, ...]
    receives: tuple[int, ...]
    """Numbers of the values that come from the stage before; those for later stages too."""
    sends: tuple[int, ...]
    """Numbers of the values that go to the stage behind."""
    is_last: bool


class Program:
    """A graph over `count` stages."""

    def __init__(self, graph: Graph, model: nn.Module, homes: dict[str, int], count: int) -> None:
        self.graph = graph
        self.placed = place(graph, model, homes)
        self.crossings = _crossings(graph, self.placed, count)
        """By boundary, from that behind stage 0 on, the values that cross it."""
        self.parts = [self._part(stage, count) for stage in range(count)]
        draws = [stage for node, stage in zip(graph.nodes, self.placed) if node.is_random]
        self.first_random = min(draws, default=count)
        """The first stage that draws random numbers."""
        self.draws_in_order = draws == sorted(draws)
        """Whether random numbers are drawn in the order of one process."""

    def _part(self, stage: int, count: int) -> Part:
        return Part(
            nodes=tuple(self.graph.nodes[i] for i in _run_by(self.graph, self.placed, stage, count)),
            receives=tuple(self.crossings[stage - 1]) if stage else (),
            sends=tuple(self.crossings[stage]) if stage < count - 1 else (),
            is_last=stage == count - 1,
        )

    def kinds(self, numbers: Sequence[int]) -> list[Kind]:
        return [self.graph.kinds[number] for number in numbers]

    def kinds_of_output(self, shadow: nn.Module) -> list[Kind]:
        """Of every tensor of the output, in order."""
        found = []
        for each in references(self.graph.output):
            if isinstance(each, Value):
                found.append(self.graph.kinds[each.number])
            else:
                tensor = getattr(shadow.get_submodule(each.name.rpartition(".")[0]), each.name.rpartition(".")[2])
                found.append(Kind(tuple(tensor.shape), tensor.dtype, tensor.requires_grad))
        return found

    def run(self, part: Part, find: Callable[[str | Named], Any], inputs: Sequence[Tensor], received: Any) -> Ran:
        """Compute a part. `find` gives a module by name or a tensor by its `Named`; `received` the values by number."""
        values: dict[int, Tensor] = {**dict(enumerate(inputs)), **received}
        device = inputs[0].device.type if inputs else "cpu"
        for modes, nodes in itertools.groupby(part.nodes, key=lambda node: node.modes):
            with _in_modes(modes, self.graph.modes, device):
                for node in nodes:
                    _run(node, values, find)
        output = None
        if part.is_last:
            output = replaced(self.graph.output, (Value, Named), lambda each: _value(each, values, find))
        return Ran(tensors=[values[number] for number in part.sends], output=output)


@dataclass(slots=True)
class Ran:
    """What a part has computed: the tensors to send, or the output of the whole."""

    tensors: list[Tensor]
    output: Any


def _run(node: Node, values: dict[int, Tensor], find: Callable[[str | Named], Any]) -> None:
    def value(each: Value | Named) -> Any:
        return _value(each, values, find)

    call: Any = find(node.call) if isinstance(node.call, str) else node.call
    args, kwargs = replaced((node.args, node.kwargs), (Value, Named), value)
    result = call(*args, **kwargs)
    made, expected = tensors_of(result), references(node.output)
    if len(made) != len(expected):
        raise PlanError(
            f"{node.name} gave {len(made)} tensors, and {len(expected)} when the pipeline was laid out: what it "
            "returns depends on more than the shapes of its input. Set plan.pp to 1."
        )
    for tensor, each in zip(made, expected):
        if isinstance(each, Value):
            values[each.number] = tensor
    if node.renewed is not None and isinstance(node.changes, Value):
        values[node.renewed.number] = values[node.changes.number]


def _value(each: Value | Named, values: dict[int, Tensor], find: Callable[[str | Named], Any]) -> Any:
    return values[each.number] if isinstance(each, Value) else find(each)


def _in_modes(modes: Modes, around: Modes, device: str) -> contextlib.ExitStack:
    """Gradients and autocast as the model had set them where a node ran."""
    stack = contextlib.ExitStack()
    if modes[0] != around[0]:
        stack.enter_context(torch.set_grad_enabled(modes[0]))
    if modes[1:] != around[1:]:
        enabled, dtype = modes[1:]
        stack.enter_context(torch.autocast(device, enabled=enabled, dtype=dtype, cache_enabled=False))
    return stack


def _crossings(graph: Graph, placed: list[int], count: int) -> list[list[int]]:
    makers = {value.number: i for i, node in enumerate(graph.nodes) for value in node.gives()}
    last_reader: dict[int, int] = {}

    def read(values: Sequence[Value | Named], stage: int) -> None:
        for each in values:
            if isinstance(each, Value):
                last_reader[each.number] = max(stage, last_reader.get(each.number, stage))

    for i in range(len(placed)):
        if placed[i] != EVERYWHERE:
            read(graph.nodes[i].reads(), placed[i])
    read(references(graph.output), count - 1)
    crossings: list[list[int]] = [[] for _ in range(count - 1)]
    for number, reader in sorted(last_reader.items()):
        maker = makers.get(number)
        if maker is None or placed[maker] == EVERYWHERE:
            continue
        for boundary in range(placed[maker], reader):
            crossings[boundary].append(number)
    return crossings


def _run_by(graph: Graph, placed: list[int], stage: int, count: int) -> list[int]:
    """The nodes that a stage runs: its own, and of those that follow from inputs what it wants, in order."""
    makers = {value: i for i, node in enumerate(graph.nodes) for value in node.gives()}
    changers = [i for i, node in enumerate(graph.nodes) if node.changes is not None and placed[i] == EVERYWHERE]
    wanted = {i for i, at in enumerate(placed) if at == stage}
    wanted |= {i for i in changers if isinstance(graph.nodes[i].changes, Named)}  # every rank has the buffer
    pending = [each for i in wanted for each in graph.nodes[i].reads()]
    pending += references(graph.output) if stage == count - 1 else []
    while pending:
        each = pending.pop()
        if not isinstance(each, Value):
            continue
        memory = graph.storages[each.number]
        for i in [makers.get(each), *changers]:
            if i is None or i in wanted or placed[i] != EVERYWHERE:
                continue
            changed = graph.nodes[i].changes
            is_change = isinstance(changed, Value) and graph.storages[changed.number] == memory
            if makers.get(each) == i or is_change:
                wanted.add(i)
                pending += graph.nodes[i].reads()
    return sorted(wanted)
