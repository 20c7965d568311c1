from __future__ import annotations

from importlib import metadata

import pytest

from trainfleet.deps import installed, require
from trainfleet.errors import DependencyError


def test_what_is_installed_is_imported():
    assert require("json.decoder", "data").__name__ == "json.decoder"


def test_what_is_missing_names_the_extra():
    with pytest.raises(DependencyError) as caught:
        require("nowhere_to_be_found.sub", "kafka")
    assert str(caught.value) == 'nowhere_to_be_found.sub needs the extra: pip install "trainfleet[kafka]".'
    with pytest.raises(DependencyError, match=r"^Kafka needs the extra"):
        require("nowhere_to_be_found", "kafka", purpose="Kafka")


def test_a_module_that_lacks_another_or_fails_to_load_is_not_called_missing(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "half_installed.py").write_text("import its_own_dependency\n")
    (tmp_path / "wrong_build.py").write_text("raise ImportError('libcuda.so.1: cannot open')\n")
    with pytest.raises(DependencyError, match="is installed but needs its_own_dependency"):
        require("half_installed", "x")
    with pytest.raises(DependencyError, match="cannot be loaded: libcuda"):
        require("wrong_build", "x")


def test_a_version_is_told_without_importing(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "explosive.py").write_text("raise SystemExit('imported')")
    assert installed("explosive") == "unknown"
    assert installed("yaml.reader") == metadata.version("PyYAML")
    assert installed("pydantic_core") == metadata.version("pydantic-core")
    assert installed("nowhere_to_be_found") is None
