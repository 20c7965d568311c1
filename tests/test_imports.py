from __future__ import annotations

import difflib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest

from trainfleet.errors import ConfigError
from trainfleet.imports import imported, load_object


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Modules beside a recipe."""
    (tmp_path / "beside_recipe.py").write_text("class Model:\n    class Inner: ...\n")
    (tmp_path / "half_recipe.py").write_text("import its_own_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("beside_recipe", None)


def test_an_import_path_names_an_object_or_something_in_it(module):
    assert load_object("beside_recipe:Model", key="model.name").__name__ == "Model"
    assert load_object("beside_recipe:Model.Inner", key="model.name").__name__ == "Inner"
    assert load_object("os.path:join", key="k").__name__ == "join"


@pytest.mark.parametrize("path", ["Model", "beside_recipe", ":Model", "beside_recipe:", ""])
def test_what_is_no_import_path_is_refused_with_an_example(path):
    with pytest.raises(ConfigError, match=r"^model\.name is .*package\.module:Name"):
        load_object(path, key="model.name")


def test_a_missing_name_suggests_the_nearest(module):
    with pytest.raises(ConfigError, match=r"has no 'Modle'\. Did you mean 'Model'"):
        load_object("beside_recipe:Modle", key="model.name")


def test_a_missing_module_is_a_wrong_setting_but_a_missing_import_inside_it_is_not(module):
    with pytest.raises(ConfigError, match="there is no module 'nowhere_at_all'"):
        load_object("nowhere_at_all.deep:Model", key="model.name")
    with pytest.raises(ModuleNotFoundError, match="its_own_dependency"):
        load_object("half_recipe:Model", key="model.name")


def test_a_module_counts_as_imported_once_it_is_whole(monkeypatch):
    assert imported("difflib") is difflib and imported("no_such_module") is None
    half = ModuleType("half")
    half.__spec__ = ModuleSpec("half", None)
    half.__spec__._initializing = True
    monkeypatch.setitem(sys.modules, "half", half)
    assert imported("half") is None
    half.__spec__._initializing = False
    assert imported("half") is half
