from __future__ import annotations

import sys
import types

import pytest

from trainfleet.data.huggingface import load_dataset
from trainfleet.errors import DataError


class Rows(list):
    format = None

    def with_format(self, format):
        found = Rows(self)
        found.format = format
        return found


@pytest.fixture
def library(monkeypatch):
    """Stands for the library, which needs a network for most of what it does."""
    module = types.ModuleType("datasets")
    splits = {"train": Rows([1, 2]), "test": Rows([3])}
    module.load_dataset = lambda path, split=None, **args: splits if split is None else splits[split]
    module.load_from_disk = lambda path, **args: splits
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_a_split_of_the_hub_comes_as_numpy(library):
    found = load_dataset("some/data", split="train")
    assert list(found) == [1, 2] and found.format == "numpy"
    assert load_dataset("some/data", split="train", format=None).format is None


def test_a_folder_is_read_from_disk_and_its_split_chosen(library, tmp_path):
    (tmp_path / "dataset_dict.json").write_text("{}")
    assert list(load_dataset(str(tmp_path), split="test")) == [3]
    with pytest.raises(DataError, match="no split 'valid'; it has train, test"):
        load_dataset(str(tmp_path), split="valid")


def test_a_missing_split_names_those_there_are(library):
    with pytest.raises(DataError, match="has the splits train, test; say which"):
        load_dataset("some/data")
