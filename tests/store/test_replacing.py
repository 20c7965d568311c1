from __future__ import annotations

from pathlib import Path

import pytest

from trainfleet.errors import StoreError
from trainfleet.store import replacing


def test_a_file_takes_the_place_of_the_older_one_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "told.txt"
    for text in ("one", "two"):
        with replacing(path) as unfinished:
            unfinished.write_text(text)
            assert not path.exists() or path.read_text() == "one"
    assert path.read_text() == "two" and list(path.parent.iterdir()) == [path]


def test_where_writing_fails_the_older_one_stands_and_nothing_is_left(tmp_path: Path) -> None:
    path = tmp_path / "told.txt"
    path.write_text("older")
    with pytest.raises(ZeroDivisionError), replacing(path) as unfinished:
        unfinished.write_text("ha")
        raise ZeroDivisionError
    sentence = r"told\.txt cannot be written: No space left on device\."
    with pytest.raises(StoreError, match=sentence), replacing(path):
        raise OSError(28, "No space left on device")
    assert path.read_text() == "older" and list(tmp_path.iterdir()) == [path]


def test_what_is_in_the_way_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written: "), replacing(tmp_path / "file" / "told.txt") as path:
        path.write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StoreError, match="cannot be written: "), replacing(tmp_path / "folder") as path:
        path.write_text("")
