from __future__ import annotations

import pickle

import numpy as np
import pytest

from trainfleet.data.arrow import ArrowTable
from trainfleet.data.loader import LocalBatches
from trainfleet.errors import DataError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def table(begin, end):
    rows = range(begin, end)
    return pa.table(
        {
            "i": pa.array(rows, pa.int64()),
            "x": pa.array([[r, r + 0.5] for r in rows], pa.list_(pa.float32(), 2)),
            "ids": pa.array([list(range(r % 3)) for r in rows], pa.list_(pa.int32())),
            "text": [f"row {r}" for r in rows],
        }
    )


def write(path, begin, end):
    if path.suffix == ".parquet":
        pq.write_table(table(begin, end), path, row_group_size=7)
    else:
        with pa.ipc.new_file(path, table(0, 1).schema) as writer:
            writer.write_table(table(begin, end), max_chunksize=7)


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize("in_memory", [True, False])
def test_rows_of_several_files_are_read_by_group(tmp_path, suffix, in_memory, monkeypatch):
    if not in_memory:
        monkeypatch.setattr("trainfleet.data.arrow.IN_MEMORY_BYTES", 0)
    write(tmp_path / f"a.{suffix}", 0, 20), write(tmp_path / f"b.{suffix}", 20, 50)
    source = ArrowTable(tmp_path, groups=2)
    assert len(source) == 50
    for row in (0, 19, 20, 49, 3):
        sample = source[row]
        assert sample["i"] == row and sample["text"] == f"row {row}"
        assert sample["x"].tolist() == [row, row + 0.5] and sample["x"].dtype == np.float32
        assert sample["ids"].tolist() == list(range(row % 3)) and sample["ids"].dtype == np.int32
    assert len(source._cache) <= 2 or in_memory
    assert pickle.loads(pickle.dumps(source))[30]["i"] == 30
    with pytest.raises(IndexError, match="50 rows"):
        source[50]


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_table_that_was_read_before_the_fork_is_read_in_workers_too(tmp_path, suffix):
    write(tmp_path / f"a.{suffix}", 0, 40)
    source = ArrowTable(tmp_path, columns=["i", "x"])
    source[39]
    with LocalBatches(source, size=10, workers=2, epochs=1, collate="numpy") as stream:
        assert sorted(int(i) for batch in stream for i in batch["i"]) == list(range(40))


def test_what_is_wrong_with_tables_is_named(tmp_path):
    write(tmp_path / "a.parquet", 0, 3)
    with pytest.raises(DataError, match="no column 'y'; it has i, x, ids, text"):
        ArrowTable(tmp_path / "a.parquet", columns=["y"])
    (tmp_path / "bad.parquet").write_bytes(b"no table")
    with pytest.raises(DataError, match=r"bad\.parquet cannot be read as a table"):
        ArrowTable(tmp_path / "bad.parquet")
    (tmp_path / "c.txt").write_text("x")
    with pytest.raises(DataError, match="no Parquet or Arrow file"):
        ArrowTable(tmp_path / "c.txt")
