"""YAML as recipes use it: the scalars of YAML 1.2, the line of every key, no key twice.

PyYAML reads YAML 1.1, where `off` is false, `1:30` is 90, `1e-3` is a text and of two equal keys the last wins.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Hashable, Mapping
from datetime import timedelta
from enum import Enum
from pathlib import Path, PurePath
from typing import Any

import yaml

from trainfleet.errors import ConfigError

KeyPath = tuple[Any, ...]

_TEXT = "tag:yaml.org,2002:str"

_SCALARS = [
    ("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("tag:yaml.org,2002:int", re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"), list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        re.compile(
            r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        list("-+.0123456789"),
    ),
    ("tag:yaml.org,2002:merge", re.compile(r"^<<$"), ["<"]),
]


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes what either version of YAML would take for something else than a text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        return super().increase_indent(flow, False)


def _int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = node.value
    base = 8 if text.startswith("0o") else 16 if text.startswith("0x") else 10
    return int(text, base)


for _tag, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(_tag, _pattern, _first)
    _Dumper.add_implicit_resolver(_tag, _pattern, _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _int)
_Dumper.add_representer(str, lambda dumper, text: dumper.represent_scalar(_TEXT, text, style=_style(text)))
_Dumper.add_representer(tuple, lambda dumper, value: dumper.represent_list(value))


def read_yaml(text: str, name: str) -> tuple[Any, dict[KeyPath, int]]:
    """What `text` says and the line of every key in it; ConfigError calls it `name`."""
    lines: dict[KeyPath, int] = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, {}
        _walk(loader, node, (), lines, name, set())
        return loader.construct_document(node), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(
            f"{name}{line} is not YAML: {error.problem or error.context}.",
            hint="Look at indentation, at colons that need a space after them, and at quotes that are not closed.",
        ) from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{name} is not YAML: {error}.") from error


def parse_value(text: str) -> Any:
    """The value that `text` has on a command line or in an environment: a YAML scalar, `[…]` or `{…}`.

    A text needs no quotes there, even with `: ` or ` #` in it.
    """
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        return text
    stripped = text.strip()
    if isinstance(value, dict | list) and stripped[0] not in "{[":
        return text
    if isinstance(value, str) and stripped[0] not in "\"'":
        return text
    return value


def to_yaml(value: Any) -> str:
    """A dataclass, or any plain value, as YAML that reads back as the same; ConfigError for what YAML cannot hold."""
    return yaml.dump(
        to_plain(value), Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=120
    )


def inline_yaml(value: Any) -> str:
    """The same on one line, as it would stand after `key: `."""
    text: str = yaml.dump(to_plain(value), Dumper=_Dumper, allow_unicode=True, default_flow_style=True, width=1 << 20)
    return text.removesuffix("\n").removesuffix("\n...")


def to_plain(value: Any, key: str = "the value") -> Any:
    """Dataclasses as mappings, paths as texts, durations as seconds, functions and classes as `module:Name`."""
    if isinstance(value, Enum):
        return to_plain(value.value, key)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name), f.name) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, Mapping):
        return {name: to_plain(item, str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_plain(item, key) for item in value]
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, timedelta):
        return value.total_seconds()
    name = getattr(value, "__qualname__", None)
    if name and "<" not in name:
        return f"{value.__module__}:{name}"
    raise ConfigError(
        f"{key} is {value!r}, a {type(value).__name__}, which YAML cannot hold. "
        "Use numbers, texts, lists, mappings, or a class or function that can be named as package.module:Name."
    )


def read_yaml_file(path: Path) -> tuple[Any, dict[KeyPath, int]]:
    """What a file says and its lines; ConfigError where it is missing, unreadable or not YAML."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        folder = path.parent
        others = sorted(p.name for p in folder.glob("*.y*ml")) if folder.is_dir() else []
        there = f" {'This folder' if folder == Path() else folder} holds {', '.join(others[:8])}." if others else ""
        raise ConfigError(f"There is no file {path}.{there}") from error
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"{path} cannot be read: {reason}.") from error
    return read_yaml(text, str(path))


def _style(text: str) -> str | None:
    """Double quotes around line ends and other signs that plain text would lose."""
    return None if text.isprintable() else '"'


def _walk(
    loader: _Loader, node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int], name: str, above: set[int]
) -> None:
    """Note the line of every key; refuse a key that stands twice, and a mapping that holds itself."""
    if not isinstance(node, yaml.MappingNode):
        return
    if id(node) in above:
        raise ConfigError(f"{name}:{node.start_mark.line + 1} holds itself by an alias.")
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        key = loader.construct_object(key_node, deep=True)
        line = key_node.start_mark.line + 1
        if isinstance(key, Hashable) and key in seen:
            dotted = ".".join(map(str, (*path, key)))
            raise ConfigError(f"{dotted} stands twice in {name}, in lines {seen[key]} and {line}. Keep one.")
        if isinstance(key, Hashable):
            seen[key] = line
    loader.flatten_mapping(node)
    for key_node, value_node in node.value:
        below = (*path, loader.construct_object(key_node, deep=True))
        if isinstance(below[-1], Hashable):
            lines[below] = key_node.start_mark.line + 1
            _walk(loader, value_node, below, lines, name, above | {id(node)})
