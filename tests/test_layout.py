"""The tree is the first page of the documentation; this keeps it true."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import trainfleet
from trainfleet.config import configuration_markdown, describe
from trainfleet.config.sections import settings_of

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "trainfleet"
TESTS = ROOT / "tests"

# Modules without a test file of their own, and why.
UNTESTED_ALONE: dict[str, str] = {}
# Folders of tests that mirror nothing in the package, and why.
OTHER_TESTS = {
    "cluster": "several processes at once",
    "device": "need a GPU",
    "recipes": "the recipes beside the package",
    "examples": "the examples beside the package",
    "benchmarks": "the benchmarks beside the package",
}
OTHER_FILES = {"test_layout", "test_models", "test_readme"}
# Everything that must work where torch is not installed.
WITHOUT_TORCH = ["errors", "log", "config", "deps", "state", "events", "batch", "loss", "plan", "balance", "mesh"]
WITHOUT_TORCH += ["store", "checkpoint", "monitor", "data", "comm.group", "comm.threads", "comm.environment"]
WITHOUT_TORCH += [
    "mpi",
    "comm.mpi_group",
    "comm.numbers",
    "cli",
    "doctor",
    "training.recipe",
    "training.schedule",
    "serve",
]


def modules(folder: Path) -> set[str]:
    """The paths of modules below `folder`, such as `data/loader`."""
    paths = (path.relative_to(folder).with_suffix("") for path in folder.rglob("*.py"))
    return {path.as_posix() for path in paths if path.name != "__init__" and "__pycache__" not in path.parts}


def mirrored() -> set[str]:
    """The modules that the test files are named for."""
    found = set()
    for path in TESTS.rglob("test_*.py"):
        folder = path.relative_to(TESTS).parent
        if (folder.parts and folder.parts[0] in OTHER_TESTS) or (not folder.parts and path.stem in OTHER_FILES):
            continue
        found.add((folder / path.stem.removeprefix("test_")).as_posix())
    return found


def test_every_test_file_has_its_module():
    assert sorted(mirrored() - modules(PACKAGE)) == []


def test_every_module_has_its_test_file_or_a_reason():
    missing = sorted(modules(PACKAGE) - mirrored() - set(UNTESTED_ALONE))
    assert not missing, f"no test file: {', '.join(missing)}"
    assert set(UNTESTED_ALONE) <= modules(PACKAGE) - mirrored(), "a reason that is no longer needed"


def test_no_file_is_long():
    long = {name: n for name in modules(PACKAGE) if (n := len((PACKAGE / f"{name}.py").read_text().splitlines())) > 400}
    assert long == {}


@pytest.mark.parametrize("name", sorted(modules(PACKAGE)))
def test_a_module_begins_with_a_sentence(name):
    docstring = ast.get_docstring(ast.parse((PACKAGE / f"{name}.py").read_text())) or ""
    assert docstring.split("\n\n")[0].strip().endswith((".", ":", "?"))


def test_all_is_what_is_exported_and_every_name_loads():
    assert sorted(trainfleet.__all__) == trainfleet.__all__
    assert sorted(name for names in trainfleet._HOMES.values() for name in names) == trainfleet.__all__
    assert set(trainfleet.__all__) <= set(dir(trainfleet))
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    typed = {a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level == 0 for a in n.names}
    assert set(trainfleet.__all__) <= typed, "what the type checker sees"
    for name in trainfleet.__all__:
        if name in ("Engine", "NativeEngine", "Trainer", "parallelize"):
            pytest.importorskip("torch", reason="these names are torch's")
        value = getattr(trainfleet, name)
        assert value.__name__ == name and (value.__doc__ or "").strip()
    with pytest.raises(AttributeError, match="no attribute 'Trainr'"):
        _ = trainfleet.Trainr


def test_no_public_name_is_also_a_module():
    """`from trainfleet import x` would give the one or the other, by what was imported before."""
    assert {path.stem for path in PACKAGE.iterdir()} & set(trainfleet.__all__) == set()


def test_the_names_of_every_package_are_there():
    pytest.importorskip("torch", reason="some packages are torch's")
    for info in pkgutil.walk_packages([str(PACKAGE)], "trainfleet."):
        if info.ispkg:
            package = importlib.import_module(info.name)
            missing = [name for name in getattr(package, "__all__", ()) if not hasattr(package, name)]
            assert missing == [], info.name


def test_what_works_without_torch_does_not_import_it():
    """In one fresh process: each module that must be light, and which of them first brought something heavy."""
    names = sorted(
        {"trainfleet"}
        | {
            "trainfleet." + name.replace("/", ".")
            for name in modules(PACKAGE)
            for light in WITHOUT_TORCH
            if f"{name}/".startswith(light.replace(".", "/") + "/")
        }
    )
    program = f"""
import importlib, sys
for name in {names!r}:
    importlib.import_module(name)
    for heavy in ("torch", "pyarrow", "matplotlib", "transformers", "datasets", "tensorboard"):
        if heavy in sys.modules:
            raise SystemExit(f"{{name}} imports {{heavy}}")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_importing_changes_nothing():
    program = """
import logging, os, signal, sys, threading
def now():
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    return dict(os.environ), list(logging.getLogger().handlers), handlers, threading.active_count(), sys.path[:]
before = now()
import trainfleet.cli.main, trainfleet.config, trainfleet.training.recipe, trainfleet.mesh
assert now() == before, (before, now())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def recipe_class() -> type:
    from trainfleet.training.recipe import Recipe

    return Recipe


def sections(cls: type) -> dict[str, type]:
    """Every settings dataclass below `cls`, by its dotted name."""
    found: dict[str, type] = {}
    for setting in settings_of(cls):
        if setting.section is not None:
            found[setting.name] = setting.section
            found |= {f"{setting.name}.{name}": below for name, below in sections(setting.section).items()}
    return found


def test_every_settings_key_is_read_somewhere():
    """As an attribute, outside the check of its own section: a key that nobody reads is a promise not kept."""
    read: set[str] = set()
    for name in modules(PACKAGE):
        tree = ast.parse((PACKAGE / f"{name}.py").read_text())
        checks = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef) and node.name == "__post_init__"
            for inner in ast.walk(node)
        }
        read |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and id(node) not in checks}
    keys = [key.key for key in describe(recipe_class())]
    assert [key for key in keys if key.rpartition(".")[2] not in read] == []


def test_every_settings_key_says_what_it_means():
    assert [key.key for key in describe(recipe_class()) if not key.meaning.endswith((".", "?"))] == []


@pytest.mark.parametrize("name", sorted(sections(recipe_class())))
def test_every_section_is_frozen_and_refuses_unknown_keys(name):
    cls = sections(recipe_class())[name]
    assert cls.__dataclass_params__.frozen and dataclasses.is_dataclass(cls)  # type: ignore[attr-defined]
    assert getattr(cls, "__pydantic_config__", {}).get("extra") == "forbid"
    assert cls.__doc__ and not cls.__doc__.startswith(f"{cls.__name__}(")


def test_the_page_of_settings_is_up_to_date():
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == configuration_markdown(recipe_class()), "run `trainfleet config docs -o docs/configuration.md`"
