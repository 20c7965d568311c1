"""Where values come from: YAML, `.env`, the environment, the command line, Python; each with its source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainfleet.config.yaml import parse_value, read_yaml_file
from trainfleet.errors import ConfigError

PREFIX = "TRAINFLEET_"


@dataclass(frozen=True, slots=True)
class Given:
    """A value that somebody gave to a key."""

    path: tuple[Any, ...]
    value: Any
    source: str
    """Such as `recipes/x.yaml:12` or `command line`."""
    text: str | None = None
    """As it was written, where everything is a text: the environment and the command line."""


def from_file(path: Path) -> Iterator[Given]:
    """The keys of a YAML file, each with its line."""
    content, lines = read_yaml_file(path)
    if content is None:
        return
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {_kind(content)}, not sections such as `plan:` with keys below them.")
    for given in _leaves(content, (), str(path)):
        line = lines.get(given.path)
        yield Given(given.path, given.value, f"{path}:{line}" if line else str(path))


def from_dotenv(path: Path | None) -> dict[str, str]:
    """The variables of a `.env` file; of the one in the working directory, if there is one, for None."""
    from dotenv import dotenv_values  # 15 ms that most runs need not spend

    if path is None:
        path = Path(".env")
        if not path.is_file():
            return {}
    try:
        with path.open(encoding="utf-8") as stream:
            return {name: value or "" for name, value in dotenv_values(stream=stream, interpolate=False).items()}
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"{path} cannot be read: {reason}.") from error


def from_variables(variables: Mapping[str, str], keys: Sequence[str], label: str) -> Iterator[Given]:
    """The values of `TRAINFLEET_SECTION__KEY` variables; `{name}` in `label` stands for the variable's name.

    A name without `__` is ours only if it is a key, or a key whose `__` became `_`, which is refused:
    launchers and other tools may have variables that begin as ours do.
    """
    flat = {key.replace(".", "_"): key for key in keys}
    for name, text in variables.items():
        if not name.startswith(PREFIX):
            continue
        rest = name.removeprefix(PREFIX).lower()
        source = label.format(name=name)
        if "__" not in rest and rest not in keys:
            if rest in flat:
                right = PREFIX + flat[rest].replace(".", "__").upper()
                raise ConfigError(f"{name} ({source}) is no key; sections end with two underscores: {right}.")
            continue
        yield from _expanded(tuple(rest.split("__")), text, source)


def from_overrides(overrides: Sequence[str]) -> Iterator[Given]:
    """The values of `section.key=value` on the command line."""
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"{override!r} is not an override. Write section.key=value, such as plan.zero=2.")
        yield from _expanded(tuple(key.strip().split(".")), text, "command line")


def from_values(values: Mapping[str, Any]) -> Iterator[Given]:
    """The values of a plain mapping; its keys may be nested, or dotted as in `{"plan.zero": 2}`."""
    for given in _leaves(values, (), "python"):
        first = given.path[0]
        path = (*first.split("."), *given.path[1:]) if isinstance(first, str) else given.path
        yield Given(path, given.value, given.source)


def _expanded(path: tuple[str, ...], text: str, source: str) -> Iterator[Given]:
    value = parse_value(text)
    if isinstance(value, Mapping) and value:
        yield from _leaves(value, path, source)
    else:
        yield Given(path, value, source, text)


def _leaves(content: Mapping[Any, Any], path: tuple[Any, ...], source: str) -> Iterator[Given]:
    for key, value in content.items():
        below = (*path, key)
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, below, source)
        else:
            yield Given(below, value, source)


def _kind(value: Any) -> str:
    return "list" if isinstance(value, list) else "single value"
