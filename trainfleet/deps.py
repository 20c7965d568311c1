"""Optional dependencies: there, or one sentence that names the extra to install."""

from __future__ import annotations

import importlib
import importlib.util
from importlib import metadata
from types import ModuleType

from trainfleet.errors import DependencyError

# Names under which modules are installed, where the two differ.
_DISTRIBUTIONS = {"PIL": "pillow", "yaml": "PyYAML", "torchft": "torchft-nightly", "grpc": "grpcio"}


def require(module: str, extra: str, *, purpose: str | None = None) -> ModuleType:
    """The module, imported; DependencyError with the command that installs it where it is missing.

    `purpose` begins the sentence in the words of the user ("Reading Parquet"), else the module's name does.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise DependencyError(
                f"{module} is installed but needs {error.name}, which is not.", hint=f"pip install {error.name}"
            ) from error
        raise DependencyError(f'{purpose or module} needs the extra: pip install "trainfleet[{extra}]".') from error
    except (ImportError, OSError) as error:  # a shared library that is missing or of another build
        raise DependencyError(
            f"{module} is installed but cannot be loaded: {error}.",
            hint=f'pip install --force-reinstall "trainfleet[{extra}]"',
        ) from error


def installed(module: str) -> str | None:
    """The version of an installed module, without importing it; None where it is missing."""
    top = module.split(".")[0]
    try:
        if importlib.util.find_spec(top) is None:
            return None
    except (ImportError, ValueError):
        return None
    for name in (_DISTRIBUTIONS.get(top, top), top.replace("_", "-")):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "unknown"
