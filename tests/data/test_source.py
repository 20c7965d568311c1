from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from trainfleet.data.order import Blocks
from trainfleet.data.source import SOURCES, Source, blocks_of, is_indexed, open_source
from trainfleet.errors import ConfigError, DataError, DependencyError


class Squares:
    def __init__(self, length=5):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return index**2


def broken():
    raise RuntimeError("the disk is away")


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setitem(sys.modules, "sources_of_a_user", sys.modules[Squares.__module__])
    return "sources_of_a_user"


def test_a_source_is_named_by_an_import_path(here):
    source = open_source(f"{here}:Squares", length=3)
    assert isinstance(source, Source) and source[2] == 4 and len(source) == 3


def test_a_source_is_named_by_a_short_name(tmp_path):
    (tmp_path / "t.csv").write_text("a\n1\n")
    assert open_source("csv", path=str(tmp_path / "t.csv"))[0] == {"a": 1}


@pytest.mark.parametrize(
    ("kind", "args", "error", "sentence"),
    [
        ("cvs", {}, ConfigError, "Did you mean 'csv'"),
        ("no.such.module:Name", {}, ConfigError, "no.such.module|no module 'no'"),
        ("csv", {"pfad": "x"}, ConfigError, "does not take these args"),
        ("csv", {"path": "no/such.csv"}, DataError, "no/such.csv does not exist"),
        ("numpy", {"arrays": {"x": []}}, DataError, "numpy is empty"),
    ],
)
def test_a_wrong_source_is_one_sentence(kind, args, error, sentence):
    with pytest.raises(error, match=sentence):
        open_source(kind, **args)


def test_a_wrong_source_of_the_user_is_one_sentence(here):
    with pytest.raises(DataError, match="broken could not be opened: RuntimeError: the disk is away"):
        open_source(f"{here}:broken")
    with pytest.raises(DataError, match="Squares is empty"):
        open_source(f"{here}:Squares", length=0)
    with pytest.raises(DataError, match="gave a int"):
        open_source("builtins:int")
    with pytest.raises(ConfigError, match=r"no 'Sqares'.*Squares"):
        open_source(f"{here}:Sqares")


def test_a_torch_dataset_is_a_source_and_an_iterable_dataset_is_not():
    data = pytest.importorskip("torch.utils.data")
    torch = pytest.importorskip("torch")
    assert is_indexed(data.TensorDataset(torch.ones(3)))

    class Stream(data.IterableDataset):
        def __iter__(self):
            return iter(range(3))

        def __len__(self):
            return 3

    assert not is_indexed(Stream())


@pytest.mark.skipif(importlib.util.find_spec("datasets") is not None, reason="the library is installed here")
def test_a_missing_library_names_its_extra():
    with pytest.raises(DependencyError, match=r'pip install "trainfleet\[hf\]"'):
        open_source("hf", path="x")


def test_every_short_name_stands_for_something(here):
    for target in SOURCES.values():
        module, name = target.split(":")
        assert callable(getattr(__import__(module, fromlist=[name]), name))


def test_importing_data_imports_no_torch_no_arrow_and_no_pillow():
    code = "import sys, trainfleet.data; print(sorted({'torch', 'pyarrow', 'PIL', 'datasets'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_only_blocks_are_blocks():
    class Source(list):
        blocks = (4, 4)

    assert blocks_of(Source([1])) is None and blocks_of([1]) is None
    Source.blocks = Blocks((4, 4), 1)
    assert blocks_of(Source([1])) == Blocks((4, 4), 1)
