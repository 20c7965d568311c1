from __future__ import annotations

from pathlib import Path

import pytest

from trainfleet.errors import StoreError
from trainfleet.store import FileStore, MemoryStore, open_store


def test_paths_and_file_urls_are_stores_of_files(tmp_path):
    for place in (tmp_path, str(tmp_path), f"file://{tmp_path}", f"file://localhost{tmp_path}"):
        store = open_store(place)
        assert isinstance(store, FileStore)
        assert store.folder == tmp_path
    assert open_store("file:///a%20b").folder == Path("/a b")


def test_memory_urls_are_new_stores_in_memory():
    assert isinstance(open_store("memory://"), MemoryStore)


@pytest.mark.parametrize("place", ["", "ftp://x/y", "memory://name", "file://host/x", "file://"])
def test_other_places_are_refused_by_name(place):
    with pytest.raises(StoreError, match=place or "where"):
        open_store(place)
