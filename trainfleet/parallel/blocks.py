"""Blocks: the repeated modules of a model, which are gathered, recomputed and compiled as units."""

from __future__ import annotations

from collections import Counter
from fnmatch import fnmatch

from torch import nn

from trainfleet.errors import PlanError


def find_blocks(model: nn.Module, patterns: tuple[str, ...] = ()) -> list[nn.Module]:
    """The blocks of `model`, outermost first in the order of the model.

    With `patterns`, the modules whose name or class name matches one of them (shell wildcards).
    Without, the children of every ModuleList, Sequential or ModuleDict of which two or more are of one
    class with children of their own; lists inside a block stay part of it.
    Raises PlanError for a pattern that matches nothing.
    """
    if patterns:
        return _named(model, patterns)
    found: list[nn.Module] = []
    _repeated(model, found)
    return found


def _named(model: nn.Module, patterns: tuple[str, ...]) -> list[nn.Module]:
    found: dict[nn.Module, None] = {}
    for pattern in patterns:
        matches = [
            module
            for name, module in model.named_modules()
            if name and (fnmatch(name, pattern) or fnmatch(type(module).__name__, pattern))
        ]
        if not matches:
            classes = sorted({type(module).__name__ for module in model.modules()} - {type(model).__name__})
            raise PlanError(
                f"plan.blocks names {pattern!r}, but no module of {type(model).__name__} has that name or class. "
                f"Its classes are {', '.join(classes)}."
            )
        found.update(dict.fromkeys(matches))
    return list(found)


def _repeated(module: nn.Module, found: list[nn.Module]) -> None:
    children = list(module.children())
    if isinstance(module, nn.ModuleList | nn.Sequential | nn.ModuleDict):
        counts = Counter(type(child) for child in children)
        blocks = [child for child in children if counts[type(child)] > 1 and _is_block(child)]
        found.extend(block for block in blocks if block not in found)
        children = [child for child in children if child not in blocks]
    for child in children:
        _repeated(child, found)


def _is_block(module: nn.Module) -> bool:
    return any(True for _ in module.children()) and any(True for _ in module.parameters())
