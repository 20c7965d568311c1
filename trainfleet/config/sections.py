"""The keys of a settings dataclass: its sections and fields, their types in words, defaults and meanings."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from trainfleet.config.yaml import inline_yaml
from trainfleet.errors import ConfigError


class _Required:
    """The default of a key that has none."""

    def __repr__(self) -> str:
        return "required"


REQUIRED = _Required()


class Key(NamedTuple):
    """One line of `docs/configuration.md`."""

    key: str
    """Dotted, such as `plan.zero`."""
    type: str
    """What is allowed, in words."""
    default: Any
    """The value, or REQUIRED."""
    meaning: str


class Setting(NamedTuple):
    """One field of a settings dataclass."""

    name: str
    type: Any
    section: type | None
    """The dataclass below this name, or None for a single value."""
    default: Any
    """The value, or REQUIRED."""


@lru_cache(maxsize=256)
def settings_of(cls: type) -> tuple[Setting, ...]:
    """The fields of `cls` that can be set."""
    try:
        hints = get_type_hints(cls, include_extras=True)
    except NameError as error:
        raise ConfigError(
            f"The types of {cls.__qualname__} cannot be read: {error}. Import them where they exist at run time."
        ) from error
    fields = [f for f in dataclasses.fields(cls) if f.init]
    return tuple(Setting(f.name, hints[f.name], section_of(hints[f.name]), _default(f)) for f in fields)


def describe(cls: type) -> list[Key]:
    """Every key below the settings dataclass `cls`, in the order they are written."""
    return [
        Key(dotted, type_in_words(setting.type), default, meanings_of(owner).get(setting.name, ""))
        for dotted, setting, default, owner in _keys(cls, "", REQUIRED)
    ]


@lru_cache(maxsize=16)
def key_names(cls: type) -> tuple[str, ...]:
    """The dotted names alone, without reading any source text."""
    return tuple(dotted for dotted, *_ in _keys(cls, "", REQUIRED))


@lru_cache(maxsize=256)
def meanings_of(cls: type) -> dict[str, str]:
    """The strings that stand under the fields of `cls` and of its bases."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            for statement, after in pairwise(_class_body(base)):
                if (
                    isinstance(statement, ast.AnnAssign)
                    and isinstance(statement.target, ast.Name)
                    and isinstance(after, ast.Expr)
                    and isinstance(after.value, ast.Constant)
                    and isinstance(after.value.value, str)
                ):
                    found[statement.target.id] = " ".join(after.value.value.split())
    return found


def value_at(value: Any, dotted: str) -> Any:
    """The value of a dotted key below a settings dataclass; keys of mappings may hold dots themselves."""
    if isinstance(value, Mapping):
        below = [(str(name), item) for name, item in value.items()]
    else:
        below = [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
    for name, item in below:
        if dotted == name:
            return item
        if dotted.startswith(name + ".") and (isinstance(item, Mapping) or dataclasses.is_dataclass(item)):
            return value_at(item, dotted.removeprefix(name + "."))
    raise KeyError(dotted)


def section_of(hint: Any) -> type | None:
    """The one settings dataclass that a type allows, as in `Retention`, `Retention | None` or `Retention | str`."""
    found = [t for t in _alternatives(hint) if isinstance(t, type) and dataclasses.is_dataclass(t)]
    return found[0] if len(found) == 1 else None


def allows_none(hint: Any) -> bool:
    return any(t in (None, type(None), Any) for t in _alternatives(hint))


def default_below(default: Any, setting: Setting) -> Any:
    """The default of a setting inside a section whose own default is `default`."""
    return setting.default if default is REQUIRED or default is None else getattr(default, setting.name)


def type_in_words(hint: Any) -> str:
    """What a type allows, as a person would say it."""
    if get_origin(hint) is Annotated:
        return type_in_words(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        words = [type_in_words(t) for t in get_args(hint) if t is not type(None)]
        return " or ".join([*words, *(["null"] if allows_none(hint) else [])])
    return _one_type_in_words(hint)


_WORDS: dict[Any, str] = {
    int: "whole number",
    float: "number",
    bool: "true or false",
    str: "text",
    Path: "path",
    timedelta: "seconds",
    Any: "anything",
    type(None): "null",
}


def _one_type_in_words(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint in _WORDS:
        return _WORDS[hint]
    if origin is Literal:
        return "one of " + ", ".join(inline_yaml(choice) for choice in arguments)
    if origin is tuple and arguments and arguments[-1] is not Ellipsis:
        return f"list of {len(arguments)}: {', '.join(type_in_words(t) for t in arguments)}"
    if origin in (list, tuple, Sequence, set, frozenset):
        return f"list of {type_in_words(arguments[0])}" if arguments else "list"
    if hint in (list, tuple):
        return "list"
    if hint is dict or origin in (dict, Mapping):
        return "mapping"
    if origin is Callable or hint is Callable:
        return "function"
    if dataclasses.is_dataclass(hint):
        return "section"
    return str(getattr(hint, "__name__", hint))


def _keys(cls: type, prefix: str, default: Any) -> Iterator[tuple[str, Setting, Any, type]]:
    for setting in settings_of(cls):
        dotted = prefix + setting.name
        below = default_below(default, setting)
        if setting.section is None or not isinstance(below, setting.section | _Required):
            yield dotted, setting, below, cls
        if setting.section is not None:
            yield from _keys(setting.section, dotted + ".", below if isinstance(below, setting.section) else REQUIRED)


def _alternatives(hint: Any) -> tuple[Any, ...]:
    if get_origin(hint) is Annotated:
        return _alternatives(get_args(hint)[0])
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return REQUIRED


def _class_body(cls: type) -> list[ast.stmt]:
    body: list[ast.stmt] = _module_body(sys.modules.get(cls.__module__))
    for name in cls.__qualname__.replace("<locals>.", "").split("."):
        inside = [n for n in body if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == name]
        body = inside[-1].body if inside else []
    return body


@lru_cache(maxsize=64)
def _module_body(module: Any) -> list[ast.stmt]:
    """The statements of a module, parsed once for all its classes."""
    try:
        return ast.parse(inspect.getsource(module)).body
    except (OSError, TypeError, SyntaxError):  # a class made in an interactive session has no source
        return []
