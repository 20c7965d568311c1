"""Find which linear layers of a model are split by column, which by row, and where whole tensors come and go.

A first layer split by column and a second split by row need one exchange between them (Shoeybi et al., Megatron-LM,
arXiv:1909.08053):

    x ──► q  k  v, gate  up ──► heads, activation ──► out, down ──► sum over ranks
          by column             each rank its part    by row

What is between them may be anything: a region computes with DTensors, so a wrong guess costs time, never the result.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from trainfleet.errors import PlanError
from trainfleet.parallel.blocks import is_named
from trainfleet.parallel.tensor.chains import convolution_regions
from trainfleet.parallel.tensor.given import given_layers, given_regions
from trainfleet.parallel.tensor.layer import Layer, Region, called_by, is_in_list, layer_of

_HEADS = ("num_heads", "n_heads", "n_head", "nhead", "heads", "num_attention_heads")
"""Attributes under which attention modules keep the number of their heads."""


def find_regions(
    model: nn.Module, size: int, whole: Sequence[str] = (), *, columns: Sequence[str] = (), rows: Sequence[str] = ()
) -> list[Region]:
    """The regions of `model`, for `size` tensor-parallel ranks; inner ones first.

    `whole`, `columns` and `rows` name modules as plan.tp_whole, plan.tp_columns and plan.tp_rows do; the first beats
    the others. Of layers that they do not name, the model's own tp_plan says how they are split, else structure.
    Raises PlanError where there is nothing to split, or `size` does not divide what would be split.
    """
    left_whole = named(model, whole)
    given = given_layers(model, size, columns, rows, left_whole)
    found = given_regions(model, given, left_whole)
    _find(model, "", True, left_whole | set(given), found)
    found = _joined(found, convolution_regions(model, size, left_whole | set(given)))
    shared = _shared_outside(model, found)
    regions = [region for region in found if not (shared & {id(p) for p in region.module.parameters()})]
    _refuse_shared([region for region in found if region not in regions])
    if not regions:
        raise PlanError(
            f"plan.tp is {size}, but {type(model).__name__} has no layers that can be split: no module in which one "
            "linear layer or convolution follows the other, as in attention or a perceptron. Set tp to 1, or name "
            "layers in plan.tp_columns."
        )
    for region in regions:
        _refuse_indivisible(model, region, size)
    return regions


def _joined(linear: Sequence[Region], convolutions: Sequence[Region]) -> list[Region]:
    """Regions of both kinds. Of a module that holds other regions, convolutions stay whole: all of it would be one."""
    kept = {region.module: region for region in linear}
    for region in convolutions:
        inside = set(region.module.modules()) - {region.module}
        if inside & {other.module for other in linear}:
            continue
        if (other := kept.get(region.module)) is not None:
            both = {"columns": other.columns + region.columns, "rows": other.rows + region.rows}
            region = replace(other, **both)  # type: ignore[arg-type]
        kept[region.module] = region
    return list(kept.values())


def _refuse_shared(dropped: Sequence[Region]) -> None:
    for region in dropped:
        if "plan." in region.source:
            raise PlanError(
                f"{region.source} split {', '.join((*region.columns, *region.rows))}, and "
                f"{region.name or 'the model'} shares a parameter with another module, which computes it whole. "
                "Leave these layers out there."
            )


def named(model: nn.Module, patterns: Sequence[str]) -> set[nn.Module]:
    """The modules that `patterns` name, as plan.tp_whole does; PlanError for one that names none."""
    found: set[nn.Module] = set()
    for pattern in patterns:
        matches = [module for name, module in model.named_modules() if is_named(name, module, pattern)]
        if not matches:
            raise PlanError(
                f"plan.tp_whole names {pattern!r}, but no module of {type(model).__name__} has that name or class."
            )
        found.update(matches)
    return found


def _find(
    module: nn.Module, name: str, is_root: bool, left_whole: set[nn.Module], found: list[Region]
) -> list[tuple[str, Layer]]:
    """Add the regions in `module`; the linear layers that it has itself and that found no partner."""
    if module in left_whole:
        return []
    linears: list[tuple[str, Layer]] = []
    for child_name, child in called_by(module, name):
        if child in left_whole:
            continue
        if (layer := layer_of(child)) is not None and not layer.is_convolution:
            linears.append((child_name, layer))
        else:
            strays = _find(child, child_name, False, left_whole, found)
            # Some models hold the layers of one attention in two modules: then their parent is the region.
            if not is_root and not isinstance(module, nn.Sequential) and not is_in_list(module, child):
                linears += strays
    pairs = group(linears)
    # This one exchanges its statistics in a way of its own, which knows no pieces.
    if not pairs or any(isinstance(inner, nn.SyncBatchNorm) for inner in module.modules()):
        return [(n, linear) for n, linear in linears if "." not in n[len(name) + 1 :]]
    found.append(
        Region(
            name=name,
            module=module,
            columns=tuple(column for columns, _ in pairs for column in columns),
            rows=tuple(row for _, row in pairs),
        )
    )
    return []


def group(linears: Sequence[tuple[str, Layer]]) -> list[tuple[tuple[str, ...], str]]:
    """(split by column, split by row) of linear layers in the order in which a module has them.

    With d the width of what comes in, a group is layers that take d, up to one that gives d again.
    """
    groups: list[tuple[tuple[str, ...], str]] = []
    columns: list[tuple[str, Layer]] = []
    for i, (name, linear) in enumerate(linears):
        following = linears[i + 1][1] if i + 1 < len(linears) else None
        if columns and _closes([column for _, column in columns], linear, following):
            groups.append((tuple(column for column, _ in columns), name))
            columns = []
        elif columns and linear.in_features != columns[0][1].in_features:
            columns = [(name, linear)]  # what came before has no partner
        else:
            columns.append((name, linear))
    return groups


def _closes(columns: Sequence[Layer], linear: Layer, following: Layer | None) -> bool:
    """Whether `linear` takes what `columns` gave, and so is split by row."""
    first = columns[0]
    width = first.in_features
    if linear.in_features != width:
        return linear.out_features == width or (len(columns) == 1 and linear.in_features == first.out_features)
    if len(columns) == 2 and all(each.out_features == width for each in (*columns, linear)):
        return False  # three alike are q, k and v
    if linear.out_features != width or following is None:
        return linear.out_features == width
    is_sibling = following.in_features == following.out_features == width
    closes_better = following.out_features == width and following.in_features == first.out_features
    return not is_sibling and not closes_better


def _shared_outside(model: nn.Module, regions: Sequence[Region]) -> set[int]:
    """Parameters of a region that another module uses too: those tied to an embedding, for instance."""
    users: defaultdict[int, set[nn.Module]] = defaultdict(set)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users[id(parameter)].add(module)
    inside = {inner for region in regions for inner in region.module.modules()}
    split = {name for region in regions for name in (*region.columns, *region.rows)}
    layers = {model.get_submodule(name) for name in split}
    return {
        key
        for key, modules in users.items()
        if len(modules) > 1 and modules & inside and (modules - inside or modules & layers)
    }


def _refuse_indivisible(model: nn.Module, region: Region, size: int) -> None:
    for inner in region.module.modules():
        for attribute in _HEADS:
            heads = getattr(inner, attribute, None)
            if isinstance(heads, int) and not isinstance(heads, bool) and heads % size:
                raise _indivisible(size, attribute, heads, region.name)
    for names, what in ((region.columns, "out_features"), (region.rows, "in_features")):
        for name in names:
            layer = layer_of(model.get_submodule(name))
            assert layer is not None
            if layer.groups > 1 and what == "in_features":
                raise PlanError(
                    f"plan.tp_rows names {name}, a convolution of {layer.groups} groups, which is split by those. Name "
                    "it in plan.tp_columns."
                )
            value = layer.groups if layer.groups > 1 else getattr(layer, what)
            if value % size:
                raise _indivisible(size, "groups" if layer.groups > 1 else what, value, name)


def _indivisible(size: int, what: str, value: int, name: str) -> PlanError:
    divisors = [divisor for divisor in range(1, value + 1) if value % divisor == 0]
    few = ", ".join(map(str, divisors[:8])) + (", …" if len(divisors) > 8 else "")
    return PlanError(
        f"plan.tp={size} does not divide {what}={value} of {name or 'the model'}. Use one of {few}, or keep it whole: "
        f"plan.tp_whole=[{name or '*'}]."
    )
