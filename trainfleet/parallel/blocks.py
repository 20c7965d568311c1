"""Blocks: the repeated modules of a model, which are gathered, recomputed and compiled as units."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatchcase

from torch import nn

from trainfleet.errors import PlanError

_LISTS = (nn.ModuleList, nn.ModuleDict)
"""They hold modules and have no forward of their own."""


def find_blocks(model: nn.Module, patterns: tuple[str, ...] = ()) -> list[nn.Module]:
    """The blocks of `model`, outermost first in the order of the model.

    With `patterns`, the modules that one of them names; see `is_named`. Without, the members of every ModuleList,
    Sequential or ModuleDict of which two or more are of one class with children of their own; lists in a list
    count as one, and lists inside a block stay part of it.
    Raises PlanError for a pattern that matches nothing, or a list of modules, which is never called.
    """
    if patterns:
        return _named(model, patterns)
    found: dict[nn.Module, None] = {}
    _repeated(model, found)
    return list(found)


def is_named(name: str, module: nn.Module, pattern: str) -> bool:
    """Whether `pattern` is the class name of `module` or its name in the model: `GPTBlock`, `layers.*`, `*.mlp`.

    Shell wildcards; as in a shell's paths, `*` stands for one part of a dotted name.
    """
    parts, wanted = name.split("."), pattern.split(".")
    by_name = len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))
    return bool(name) and (by_name or fnmatchcase(type(module).__name__, pattern))


def _named(model: nn.Module, patterns: tuple[str, ...]) -> list[nn.Module]:
    found: set[nn.Module] = set()
    for pattern in patterns:
        matches = {module: name for name, module in model.named_modules() if is_named(name, module, pattern)}
        if not matches:
            classes = sorted({type(module).__name__ for module in model.modules()} - {type(model).__name__})
            raise PlanError(
                f"plan.blocks names {pattern!r}, but no module of {type(model).__name__} has that name or class. "
                f"Its classes are {', '.join(classes)}."
            )
        for module, name in matches.items():
            if isinstance(module, _LISTS):
                raise PlanError(
                    f"plan.blocks names {pattern!r}, which is the {type(module).__name__} {name}: a list of modules "
                    f"that is never called itself. Name its members: {name + '.*'!r}."
                )
        found.update(matches)
    return [module for module in model.modules() if module in found]


def _repeated(module: nn.Module, found: dict[nn.Module, None]) -> None:
    if not isinstance(module, (*_LISTS, nn.Sequential)):
        for child in module.children():
            _repeated(child, found)
        return
    members = list(_members(module))
    counts = Counter(type(member) for member in members)
    for member in members:
        if counts[type(member)] > 1 and _is_block(member):
            found[member] = None
        else:
            _repeated(member, found)


def _members(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, _LISTS):
            yield from _members(child)
        else:
            yield child


def _is_block(module: nn.Module) -> bool:
    return any(True for _ in module.children()) and any(True for _ in module.parameters())
