"""Stages: which module belongs to which stage of a pipeline, balanced by what each computes.

Modules that are called in turn are dealt out in turn. What is computed between them goes with its inputs: what follows
from the forward's inputs alone is computed by every stage that wants it, what follows from parameters alone by the
first stage that wants it, and all else as early as it can be.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from trainfleet.balance import cut
from trainfleet.errors import PlanError
from trainfleet.parallel.pipeline.graph import Graph, Named, Node, Value, references

EVERYWHERE = -1
"""The stage of what each stage computes for itself."""
_OF_PARAMETERS = -2
_LISTS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stages:
    """Who holds what. Of several stages, the first is the one where a module is called first."""

    count: int
    homes: dict[str, int]
    """By leaf, the stage that calls it."""
    leaves: dict[str, tuple[int, ...]]
    """By leaf, the stages that hold it: several where it is called again later; none in particular (EVERYWHERE) for
    those without a state."""
    parameters: dict[str, tuple[int, ...]]
    """By parameter, the stages that hold it: several where it is tied."""


def leaf_names(model: nn.Module, blocks: Sequence[nn.Module], beginnings: Sequence[str] = ()) -> list[str]:
    """The modules that stay whole: blocks, and outside them the largest that hold none; without blocks, the smallest.

    Modules on the way to one of `beginnings` are no leaves.
    """
    inside = set(blocks)
    known = dict(model.named_modules())
    if missing := [name for name in beginnings if name not in known or not name]:
        raise PlanError(
            f"plan.stages names {missing[0]!r}, but {type(model).__name__} has no such module. Name modules as "
            f"named_modules() does, such as {next(iter(list(known)[1:]), 'blocks.1')!r}."
        )
    on_the_way = {name.rpartition(".")[0] for name in beginnings}
    on_the_way |= {parent for name in beginnings for parent in _parents(name)}
    found: dict[nn.Module, str] = {}

    def walk(module: nn.Module, name: str) -> None:
        children = list(module.named_children())
        is_whole = not any(inner in inside for inner in module.modules()) if inside else not children
        is_leaf = module in inside or (is_whole and not isinstance(module, _LISTS))
        if name and is_leaf and name not in on_the_way:
            found.setdefault(module, name)
            return
        for child, inner in children:
            walk(inner, f"{name}.{child}" if name else child)

    walk(model, "")
    return list(found.values())


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def divide(graph: Graph, model: nn.Module, leaves: Sequence[str], count: int, beginnings: Sequence[str] = ()) -> Stages:
    """`count` stages of `model`, whose forward is `graph`; `beginnings` are the modules that begin the later ones.

    Raises PlanError where there are too few modules.
    """
    kinds = _kinds(graph, stateless(model, leaves))
    costs: dict[str, float] = {}
    pending, last = 0.0, None
    for node, kind in zip(graph.nodes, kinds):
        if kind in (EVERYWHERE, _OF_PARAMETERS):
            continue
        if isinstance(node.call, str):
            last = node.call
            costs[last] = costs.get(last, 0.0) + node.cost + pending
            pending = 0.0
        elif last is not None:
            costs[last] += node.cost
        else:
            pending += node.cost
    called = list(costs)
    if len(called) < count:
        raise PlanError(
            f"The forward of {type(model).__name__} calls {len(called)} modules one after the other ("
            f"{', '.join(called[:6]) or 'none'}{', ...' if len(called) > 6 else ''}), which cannot be dealt out to "
            f"{count} stages. Use fewer (plan.pp, plan.stages_per_rank), or name smaller plan.blocks."
        )
    ranges = _named_ranges(called, beginnings) if beginnings else cut([costs[name] for name in called], count)
    homes = {called[i]: stage for stage, members in enumerate(ranges) for i in members}
    for name, previous in zip(leaves, [None, *leaves]):  # those never called stay with their neighbour
        homes.setdefault(name, homes.get(previous or "", 0))
    placed = place(graph, model, homes)
    return Stages(
        count=count,
        homes=homes,
        leaves=_holders_of_leaves(graph, model, homes, placed),
        parameters=_holders_of_parameters(graph, model, homes, placed),
    )


def _named_ranges(called: list[str], beginnings: Sequence[str]) -> list[range]:
    starts = [0]
    for name in beginnings:
        start = next((i for i, leaf in enumerate(called) if leaf == name or leaf.startswith(f"{name}.")), None)
        if start is None or start <= starts[-1]:
            reason = "is never called" if start is None else "does not come after the one before it"
            raise PlanError(
                f"plan.stages names {name!r}, which {reason}. The forward calls, in this order, {', '.join(called)}."
            )
        starts.append(start)
    return [range(start, end) for start, end in zip(starts, [*starts[1:], len(called)])]


def stateless(model: nn.Module, leaves: Sequence[str]) -> set[str]:
    """Those of `leaves` without parameters and buffers: every stage can have them."""
    found = set()
    for name in leaves:
        module = model.get_submodule(name)
        if not any(True for _ in module.parameters()) and not any(True for _ in module.buffers()):
            found.add(name)
    return found


def _kinds(graph: Graph, without_state: set[str]) -> list[int]:
    """EVERYWHERE, _OF_PARAMETERS, or 0 for nodes that belong to one stage."""
    free: set[Value] = {Value(i) for i in range(graph.num_inputs)}
    of_parameters: set[Value] = set()
    kinds = []
    for node in graph.nodes:
        reads = node.reads()
        has_state = isinstance(node.call, str) and node.call not in without_state
        parameters = any(isinstance(each, Named) and each.is_parameter for each in reads)
        values = {each for each in reads if isinstance(each, Value)}
        if not has_state and not node.is_random and not parameters and values <= free:
            kinds.append(EVERYWHERE)
            free.update(node.gives())
        elif not has_state and not node.is_random and not node.changes and values <= free | of_parameters:
            kinds.append(_OF_PARAMETERS)
            of_parameters.update(node.gives())
        else:
            kinds.append(0)
    return kinds


def place(graph: Graph, model: nn.Module, homes: dict[str, int]) -> list[int]:
    """The stage of each node, or EVERYWHERE."""
    kinds = _kinds(graph, stateless(model, list(homes)))
    of: dict[Value, int] = {}
    latest = 0
    placed = list(kinds)
    for i, (node, kind) in enumerate(zip(graph.nodes, kinds)):
        if kind != 0:
            continue
        before = [of[each] for each in node.reads() if isinstance(each, Value) and each in of]
        if isinstance(node.call, str):
            before.append(homes[node.call])
        placed[i] = max(before, default=latest)
        latest = max(latest, placed[i])
        of.update(dict.fromkeys(node.gives(), placed[i]))
    _place_of_parameters(graph, placed)
    _refuse_changes_elsewhere(graph, placed)
    return placed


def _place_of_parameters(graph: Graph, placed: list[int]) -> None:
    """What follows from parameters alone goes to the first stage that wants it."""
    last = max((stage for stage in placed), default=0)
    wanted: dict[Value, int] = {}

    def want(values: list[Value | Named], stage: int) -> None:
        for each in values:
            if isinstance(each, Value):
                wanted[each] = min(stage, wanted.get(each, stage))

    want(references(graph.output), max(last, 0))
    for i in reversed(range(len(placed))):
        node = graph.nodes[i]
        if placed[i] == _OF_PARAMETERS:
            placed[i] = min((wanted[each] for each in node.gives() if each in wanted), default=0)
        if placed[i] != EVERYWHERE:
            want(node.reads(), placed[i])


def _refuse_changes_elsewhere(graph: Graph, placed: list[int]) -> None:
    """PlanError where a node writes into memory that another stage has too."""
    made = {value: placed[i] for i, node in enumerate(graph.nodes) for value in node.gives()}
    readers: defaultdict[Value, list[int]] = defaultdict(list)
    for i, node in enumerate(graph.nodes):
        for each in node.reads():
            if isinstance(each, Value):
                readers[each].append(i)
    by_memory: defaultdict[int, list[Value]] = defaultdict(list)
    for number, memory in graph.storages.items():
        by_memory[memory].append(Value(number))
    for i, node in enumerate(graph.nodes):
        if isinstance(node.changes, Named) and placed[i] != EVERYWHERE:
            raise _refusal(node, f"writes into {node.changes.name} what follows from activations")
        if not isinstance(node.changes, Value):
            continue
        new = set(node.gives())
        for alias in by_memory[graph.storages[node.changes.number]]:
            if alias in new:
                continue
            home = made.get(alias, EVERYWHERE)
            later = [j for j in readers[alias] if j > i]
            earlier_elsewhere = [j for j in readers[alias] if j < i and placed[j] > placed[i]]
            if home != placed[i] and (later or home == EVERYWHERE):
                raise _refusal(node, "writes into a tensor that another stage computes")
            if earlier_elsewhere and placed[i] != EVERYWHERE:
                raise _refusal(node, "writes into a tensor that a later stage reads")


def _refusal(node: Node, what: str) -> PlanError:
    return PlanError(
        f"{node.where}: {node.name} {what}, which a pipeline cannot keep alike on its stages. Call the form that "
        "returns a new tensor, or do it inside a block."
    )


def _holders_of_leaves(
    graph: Graph, model: nn.Module, homes: dict[str, int], placed: list[int]
) -> dict[str, tuple[int, ...]]:
    stages: defaultdict[str, set[int]] = defaultdict(set)
    for node, stage in zip(graph.nodes, placed):
        if isinstance(node.call, str):
            stages[node.call].add(stage)
    found = {}
    without_state = stateless(model, list(homes))
    for name, home in homes.items():
        held = tuple(sorted(stages[name] | {home} - {EVERYWHERE})) if name not in without_state else (EVERYWHERE,)
        counters = [m for m in model.get_submodule(name).modules() if isinstance(m, _NormBase)]
        if len(held) > 1 and any(counter.track_running_stats for counter in counters):
            raise PlanError(
                f"{name} is called in stages {held} of the pipeline, and keeps statistics over batches, which would "
                "differ between them. Name plan.stages so that one stage holds all of its calls."
            )
        found[name] = held
    return found


def _holders_of_parameters(
    graph: Graph, model: nn.Module, homes: dict[str, int], placed: list[int]
) -> dict[str, tuple[int, ...]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    stages: dict[str, set[int]] = {name: set() for name in names.values()}
    for node, stage in zip(graph.nodes, placed):
        for each in node.reads():
            if isinstance(each, Named) and each.is_parameter:
                stages[each.name].add(max(stage, 0))
    for each in references(graph.output):
        if isinstance(each, Named) and each.is_parameter:
            stages[each.name].add(max(max(placed, default=0), 0))
    leaves = _holders_of_leaves(graph, model, homes, placed)
    for leaf, held in leaves.items():
        for parameter in model.get_submodule(leaf).parameters():
            stages[names[id(parameter)]].update(stage for stage in held if stage != EVERYWHERE)
    neighbour: set[int] = next((held for held in stages.values() if held), {0})
    found = {}
    for name, used_by in stages.items():
        neighbour = used_by or {max(neighbour)}  # one that nothing uses stays with the one before it
        found[name] = tuple(sorted(neighbour))
    return found
