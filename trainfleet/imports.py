"""Objects by import path: `package.module:Name`, as recipes name models, datasets, losses and optimizers."""

from __future__ import annotations

import difflib
import importlib
import sys
from types import ModuleType
from typing import Any

from trainfleet.errors import ConfigError


def load_object(path: str, *, key: str) -> Any:
    """What `path` names; `key` is the recipe's key, for the error. Raises ConfigError with the nearest name.

    `package.module:Name.attribute`. Errors that the module raises while it is imported pass through.
    """
    module_name, colon, name = path.partition(":")
    if not colon or not module_name or not name:
        raise ConfigError(f"{key} is {path!r}; write an import path such as 'package.module:Name', or a short name.")
    try:
        value = importlib.import_module(module_name)
    except ModuleNotFoundError as exc:
        # Only where the named module itself is missing; a missing import inside it is another story.
        if exc.name is None or not f"{module_name}.".startswith(f"{exc.name}."):
            raise
        raise ConfigError(
            f"{key} is {path!r}, but there is no module {exc.name!r}. "
            "It is looked for beside the recipe and on Python's path; install it or correct the name."
        ) from exc
    for part in name.split("."):
        if not hasattr(value, part):
            near = difflib.get_close_matches(part, [n for n in dir(value) if not n.startswith("_")], n=1)
            suggestion = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{key} is {path!r}, but {module_name} has no {part!r}.{suggestion}")
        value = getattr(value, part)
    return value


def imported(name: str) -> ModuleType | None:
    """The module if it has been imported, and not only in part, as while another thread is about it."""
    module = sys.modules.get(name)
    return None if getattr(getattr(module, "__spec__", None), "_initializing", False) else module
