"""Put the values of all sources together, check them, and remember which source won."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from trainfleet.config.check import Refused, checked
from trainfleet.config.sections import (
    REQUIRED,
    Setting,
    allows_none,
    default_below,
    key_names,
    meanings_of,
    settings_of,
    type_in_words,
)
from trainfleet.config.sources import Given, from_dotenv, from_file, from_overrides, from_values, from_variables
from trainfleet.errors import ConfigError, PlanError, TrainfleetError

T = TypeVar("T")
Tree = dict[Any, Any]  # of Tree and Given
Dotted = str  # such as plan.zero


@dataclass(frozen=True, slots=True)
class Loaded(Generic[T]):
    """Checked settings, and who decided each of them."""

    value: T
    sources: dict[Dotted, str]
    """For each key `default`, `recipes/x.yaml:12`, `.env`, `environment TRAINFLEET_…`, `command line` or `python`."""


def load_config(
    cls: type[T],
    *,
    file: Path | None = None,
    overrides: Sequence[str] = (),
    values: Mapping[str, Any] | None = None,
    env: Mapping[str, str] | None = None,
    dotenv: Path | None = None,
) -> Loaded[T]:
    """The settings dataclass `cls` with the values of all sources; ConfigError names all that is wrong.

    Later beats earlier: defaults, `file`, `dotenv` (None: `.env` of the working directory, if there),
    `env` (None: the environment of this process), `overrides`, `values`. Mappings merge key by key.
    """
    root: type = cls
    keys = key_names(root)
    given: list[Given] = [*from_file(Path(file))] if file is not None else []
    given += from_variables(from_dotenv(dotenv), keys, str(dotenv or ".env"))
    given += from_variables(os.environ if env is None else env, keys, "environment {name}")
    given += [*from_overrides(overrides), *from_values(values or {})]
    builder = _Builder(root)
    value = builder.build(root, _merged(given), (), REQUIRED)
    if builder.problems:
        raise _together(builder.problems)
    return Loaded(value, builder.sources)


def _merged(given: Iterable[Given]) -> Tree:
    """One tree in which the last given value of each key stands; a single value and a mapping replace each other."""
    tree: Tree = {}
    for item in given:
        node = tree
        for part in item.path[:-1]:
            if not isinstance(node.get(part), dict):
                node[part] = {}
            node = node[part]
        node[item.path[-1]] = item
    return tree


class _Builder:
    """Builds sections from a tree, depth first, and collects what is wrong instead of stopping at it."""

    def __init__(self, root: type) -> None:
        self._root = root
        self.problems: list[TrainfleetError] = []
        self.sources: dict[Dotted, str] = {}

    def build(self, cls: type, tree: Tree, path: tuple[str, ...], default: Any) -> Any:
        """An instance of `cls`, or None after noting problems."""
        before = len(self.problems)
        settings = {setting.name: setting for setting in settings_of(cls)}
        for name in [name for name in tree if name not in settings]:
            self._refuse(_unknown_key((*path, name), tree[name], cls, self._root))
        values = {
            name: self._value(cls, setting, tree.get(name), (*path, name), default_below(default, setting))
            for name, setting in settings.items()
        }
        if len(self.problems) > before:
            return None
        try:
            return cls(**values)
        except TrainfleetError as error:
            error.hint = error.hint or self._where(str(error), path)
            self.problems.append(error)
        except (TypeError, ValueError) as error:
            self._refuse(f"{'.'.join(path) or cls.__name__} cannot be as it is: {error}")
        return None

    def _value(self, cls: type, setting: Setting, node: Any, path: tuple[str, ...], default: Any) -> Any:
        section, dotted = setting.section, ".".join(path)
        if isinstance(node, Given) and section is not None and isinstance(node.value, section):
            self._note(node.value, setting, path, node.source)
            return node.value
        if section is not None and _is_empty(node) and not (node is not None and allows_none(setting.type)):
            node = None
        if node is None and default is not REQUIRED:
            self._note(default, setting, path, "default")
            return default
        if section is not None and (node is None or isinstance(node, dict)):
            return self.build(section, node or {}, path, default if isinstance(default, section) else REQUIRED)
        if node is None:
            meaning = meanings_of(cls).get(setting.name, "")
            return self._refuse(f"{dotted} is missing; allowed: {type_in_words(setting.type)}. {meaning}".rstrip())
        return self._single(setting, node, path)

    def _single(self, setting: Setting, node: Any, path: tuple[str, ...]) -> Any:
        dotted, leaves = ".".join(path), _flat(node, path)
        self.sources.update({".".join(map(str, below)): leaf.source for below, leaf in leaves.items()})
        value, first = _plain(node), next(iter(leaves.values()))
        try:
            return checked(setting.type, value, node.text if isinstance(node, Given) else None)
        except Refused as refused:
            return self._refuse(f"{dotted} is {_shown(value)} ({first.source}); {refused}.")
        except TrainfleetError as error:
            self.problems.append(error)
            return None

    def _note(self, value: Any, setting: Setting, path: tuple[str, ...], source: str) -> None:
        if setting.section is not None and isinstance(value, setting.section):
            for below in settings_of(setting.section):
                self._note(getattr(value, below.name), below, (*path, below.name), source)
        else:
            self.sources[".".join(path)] = source

    def _refuse(self, sentence: str) -> None:
        self.problems.append(ConfigError(sentence))

    def _where(self, sentence: str, path: tuple[str, ...]) -> str | None:
        """Where the keys of this section come from that a sentence of its own check speaks of."""
        prefix = ".".join(path) + "." if path else ""
        named = [
            f"{key} ({source})"
            for key, source in self.sources.items()
            if key.startswith(prefix)
            and source != "default"
            and re.search(rf"\b{re.escape(key.split('.')[-1])}\b", sentence)
        ]
        return f"Where from: {', '.join(named)}." if named else None


def _unknown_key(path: tuple[Any, ...], node: Any, cls: type, root: type) -> str:
    dotted, source = ".".join(map(str, path)), next(iter(_flat(node, path).values())).source
    near = nearest_keys(dotted, root, sections=isinstance(node, dict))
    if near:
        return f"There is no key {dotted} ({source}); did you mean {' or '.join(near)}?"
    names = ", ".join(setting.name for setting in settings_of(cls))
    return f"There is no key {dotted} ({source}); {'.'.join(map(str, path[:-1])) or 'the top level'} has {names}."


def nearest_keys(dotted: Dotted, root: type, *, sections: bool = False) -> list[Dotted]:
    """The keys of `root` that somebody who wrote `dotted` may have meant: of that name elsewhere, or spelt alike."""
    keys = list(key_names(root))
    if sections:
        keys = sorted({key[: at.start()] for key in keys for at in re.finditer(r"\.", key)}) or keys
    parent, _, last = dotted.rpartition(".")
    same = [key for key in keys if key.rpartition(".")[2] == last]
    if same:
        return same[:3]
    siblings = {key.rpartition(".")[2]: key for key in keys if key.rpartition(".")[0] == parent}
    close = difflib.get_close_matches(last, siblings, n=1, cutoff=0.6)
    if close:
        return [siblings[close[0]]]
    whole = difflib.get_close_matches(dotted, keys, n=1, cutoff=0.75)
    if whole and not siblings:
        return whole
    alike = difflib.get_close_matches(last, {key.rpartition(".")[2] for key in keys}, n=1, cutoff=0.75)
    return [key for key in keys if alike and key.rpartition(".")[2] == alike[0]][:3]


def _together(problems: list[TrainfleetError]) -> TrainfleetError:
    """One error as it is; several as one, a line each."""
    if len(problems) == 1:
        return problems[0]
    kind = PlanError if all(isinstance(problem, PlanError) for problem in problems) else ConfigError
    lines = [f"  {problem}" + (f" ({problem.hint})" if problem.hint else "") for problem in problems]
    return kind("\n".join([f"{len(problems)} things are wrong:", *lines]))


def _names(sentence: str, word: str) -> bool:
    return re.search(rf"\b{re.escape(word)}\b", sentence) is not None


def _is_empty(node: Any) -> bool:
    return isinstance(node, Given) and (node.value is None or (isinstance(node.value, Mapping) and not node.value))


def _flat(node: Any, path: tuple[Any, ...]) -> dict[tuple[Any, ...], Given]:
    if isinstance(node, Given):
        return {path: node}
    return {below: leaf for key, child in node.items() for below, leaf in _flat(child, (*path, key)).items()}


def _plain(node: Any) -> Any:
    return node.value if isinstance(node, Given) else {key: _plain(child) for key, child in node.items()}


def _shown(value: Any) -> str:
    shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
