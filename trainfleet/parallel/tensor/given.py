"""Which layers somebody has said how to split: the plan, and the model's own `tp_plan` of transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from trainfleet.errors import PlanError
from trainfleet.parallel.blocks import is_named
from trainfleet.parallel.tensor.layer import Region, called_by, is_in_list, layer_of

Kind = Literal["column", "row"]
Source = Literal["plan.tp_columns and plan.tp_rows", "the model's own tp_plan"]

_KINDS: dict[str, Kind] = {
    **dict.fromkeys(("colwise", "colwise_gather_output", "colwise_rep"), "column"),
    **dict.fromkeys(("rowwise", "rowwise_split_input", "rowwise_rep"), "row"),
}
"""Styles of transformers that split a linear layer. Where its output or input is whole is seen when it computes."""


@dataclass(frozen=True, slots=True)
class Given:
    """How one linear layer is to be split, and who says so."""

    name: str
    kind: Kind
    source: Source


def given_layers(
    model: nn.Module, size: int, columns: Sequence[str], rows: Sequence[str], left_whole: set[nn.Module]
) -> dict[nn.Module, Given]:
    """What the plan says (names or classes, as in plan.tp_columns and plan.tp_rows), and where it is silent the model.

    Raises PlanError where the plan names what is no linear layer, or one layer twice.
    """
    given: dict[nn.Module, Given] = {}
    for key, kind, patterns in (("tp_columns", "column", columns), ("tp_rows", "row", rows)):
        for pattern in patterns:
            matches = [(name, module) for name, module in model.named_modules() if is_named(name, module, pattern)]
            if not matches:
                raise PlanError(
                    f"plan.{key} names {pattern!r}, but no module of {type(model).__name__} has that name or class."
                )
            for name, module in matches:
                _refuse(key, pattern, name, module, kind, given)
                given[module] = Given(name, kind, "plan.tp_columns and plan.tp_rows")  # type: ignore[arg-type]
    for name, (module, kind) in _of_model(model, size).items():
        given.setdefault(module, Given(name, kind, "the model's own tp_plan"))
    return {module: each for module, each in given.items() if module not in left_whole}


def _refuse(key: str, pattern: str, name: str, module: nn.Module, kind: str, given: Mapping[nn.Module, Given]) -> None:
    if layer_of(module) is None:
        raise PlanError(
            f"plan.{key} names {pattern!r}, and {name} is a {type(module).__name__}, which is no linear layer or "
            "convolution that can be split. Name the layers themselves."
        )
    if module in given and given[module].kind != kind:
        raise PlanError(f"{name} is named by both plan.tp_columns and plan.tp_rows. Leave it in one of them.")


def _of_model(model: nn.Module, size: int) -> dict[str, tuple[nn.Module, Kind]]:
    """The linear layers that `tp_plan` or `config.base_model_tp_plan` of the model, or of a model in it, splits.

    Styles that split no linear layer (of experts, norms, embeddings) say nothing here.
    """
    found: dict[str, tuple[nn.Module, Kind]] = {}
    for prefix, part in model.named_modules():
        for inner, style in _plans(part):
            kind = _KINDS.get(style)
            pattern = f"{prefix}.{inner}" if prefix else inner
            for name, module in model.named_modules() if kind else ():
                layer = layer_of(module) if is_named(name, module, pattern) and "." + inner in "." + pattern else None
                # A layer whose output is gathered has no partner that must be split as it is.
                is_whole = (
                    layer is None
                    or layer.is_convolution
                    or (style not in ("colwise", "rowwise") and layer.out_features % size)
                )
                if kind and not is_whole:
                    found[name] = (module, kind)
    return found


def _plans(part: nn.Module) -> list[tuple[str, str]]:
    plans: list[tuple[str, str]] = []
    of_base = getattr(getattr(part, "config", None), "base_model_tp_plan", None)
    base = getattr(part, "base_model_prefix", "")
    prefix = f"{base}." if isinstance(base, str) and isinstance(getattr(part, base or "-", None), nn.Module) else ""
    if isinstance(of_base, Mapping):
        plans += [(f"{prefix}{name}", style) for name, style in of_base.items()]
    for attribute in ("_tp_plan", "tp_plan"):
        own = getattr(part, attribute, None)
        if isinstance(own, Mapping):
            plans += list(own.items())
    return [(name, style) for name, style in plans if isinstance(name, str) and isinstance(style, str)]


def given_regions(model: nn.Module, given: Mapping[nn.Module, Given], left_whole: set[nn.Module]) -> list[Region]:
    """The smallest modules that hold both columns and rows; a layer that has no partner is a region of its own."""
    found: list[Region] = []
    strays = _walk(model, "", given, left_whole, found)
    found += [_alone(module, each) for module, each in strays]
    return found


def _walk(
    module: nn.Module,
    name: str,
    given: Mapping[nn.Module, Given],
    left_whole: set[nn.Module],
    found: list[Region],
) -> list[tuple[nn.Module, Given]]:
    """Add the regions in `module`; the given layers in it that found no partner."""
    pending: list[tuple[nn.Module, Given]] = []
    for child_name, child in called_by(module, name):
        if child in left_whole:
            continue
        if child in given:
            pending.append((child, given[child]))
            continue
        strays = _walk(child, child_name, given, left_whole, found)
        if is_in_list(module, child):  # layers of two blocks are no partners
            found += [_alone(stray, each) for stray, each in strays]
        else:
            pending += strays
    columns = tuple(each.name for _, each in pending if each.kind == "column")
    rows = tuple(each.name for _, each in pending if each.kind == "row")
    if not (columns and rows) or any(isinstance(inner, nn.SyncBatchNorm) for inner in module.modules()):
        return pending
    sources = sorted({each.source for _, each in pending})
    found.append(Region(name=name, module=module, columns=columns, rows=rows, source=" and ".join(sources)))
    return []


def _alone(module: nn.Module, given: Given) -> Region:
    names = (given.name,)
    columns, rows = (names, ()) if given.kind == "column" else ((), names)
    return Region(name=given.name, module=module, columns=columns, rows=rows, source=given.source)
