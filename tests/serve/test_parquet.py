"""A part says where it stands, and is taken for nothing else."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("pyarrow", reason="parts are written by pyarrow")
from trainfleet.errors import DataError
from trainfleet.serve.parquet import Part, part_files, part_name, read_columns, read_parts, write_part
from trainfleet.store.file import FileStore

PART = Part(of="0f", begin=0, end=5, kept=2, state={"epoch": 0, "position": 5})
COLUMNS = {"indices": np.array([1, 4]), "classes": np.array([[3], [1]], np.int32)}
COLUMNS["probabilities"] = np.arange(8, dtype=np.float32).reshape(2, 4)


def test_a_part_comes_back_with_its_place(tmp_path):
    size = write_part(FileStore(tmp_path), 0, PART, COLUMNS)
    ((path, part),) = read_parts(tmp_path)
    assert part == PART and path.stat().st_size == size
    found = read_columns(path, part)
    assert found.keys() == COLUMNS.keys() and all((found[name] == COLUMNS[name]).all() for name in COLUMNS)
    assert {name: column.dtype for name, column in found.items()} == {n: c.dtype for n, c in COLUMNS.items()}


def test_parts_come_in_the_order_of_their_numbers_and_other_files_are_passed_over(tmp_path):
    for number in (9, 10, 1_000_000, 100):
        (tmp_path / part_name(number)).touch()
    for name in ("part-1.parquet", "part-x.parquet", ".part-000003.parquet", "part-000003.parquet.txt"):
        (tmp_path / name).touch()
    numbers = [int(path.stem.removeprefix("part-")) for path in part_files(tmp_path)]
    assert numbers == [9, 10, 100, 1_000_000]


def test_a_table_of_somebody_else_is_no_part(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"index": [1]}), tmp_path / part_name(0))
    with pytest.raises(DataError, match=r"part-000000[.]parquet cannot be used"):
        list(read_parts(tmp_path))


@pytest.mark.parametrize("wrong", [{"begin": 1}, {"begin": -1}, {"kept": 3}, {"kept": 6}, {"end": 1.5}, {"of": None}])
def test_a_part_whose_numbers_cannot_be_is_refused(tmp_path, wrong):
    write_part(FileStore(tmp_path), 0, Part(**{**PART.__dict__, **({} if "kept" in wrong else wrong)}), COLUMNS)
    if "kept" in wrong:  # as it was written, but with another number in its metadata
        import pyarrow as pa
        from pyarrow import parquet

        told = json.dumps({**PART.__dict__, **wrong}).encode()
        table = pa.table({"index": [1, 4]}).replace_schema_metadata({b"trainfleet": told})
        parquet.write_table(table, tmp_path / part_name(0))
    with pytest.raises(DataError, match="cannot be used"):
        list(read_parts(tmp_path))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
)


@given(JSON, st.sampled_from(sorted(PART.__dict__)))
def test_whatever_is_told_is_understood_or_refused(told, key):
    for value in (told, {**PART.__dict__, key: told}):
        with contextlib.suppress(ValueError, TypeError):
            assert isinstance(Part.from_json(json.dumps(value).encode()), Part)


def test_a_place_that_json_does_not_have_is_refused_in_words(tmp_path):
    with pytest.raises(DataError, match="place in the data cannot be written"):
        write_part(FileStore(tmp_path), 0, Part(**{**PART.__dict__, "state": {"at": {1, 2}}}), COLUMNS)
    assert not list(tmp_path.glob("part-*"))
