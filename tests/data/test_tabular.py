from __future__ import annotations

import pickle

import numpy as np
import pytest

from trainfleet.data.tabular import CsvTable, NumpyArrays
from trainfleet.errors import DataError


def write(path, text):
    path.write_text(text)
    return path


def test_csv_columns_are_integers_floats_or_text(tmp_path):
    table = CsvTable(write(tmp_path / "t.csv", "id,height,name\n1,1.5,ann\n2,2,bo\n"))
    assert len(table) == 2
    assert table[1] == {"id": 2, "height": 2.0, "name": "bo"}
    assert table[0]["id"].dtype == np.int64 and table[0]["height"].dtype == np.float32


def test_csv_gives_an_input_vector_and_a_target(tmp_path):
    path = write(tmp_path / "t.csv", "a,b,y,note\n1,0.5,0,x\n2,1.5,1,x\n")
    table = CsvTable(path, columns=["a", "b", "y"], target="y")
    assert table[1]["input"].tolist() == [2, 1.5] and table[1]["input"].dtype == np.float32
    assert table[1]["target"] == 1 and table[1]["target"].dtype == np.int64
    assert CsvTable(path, inputs=["b"], target="y")[0]["input"].tolist() == [0.5]


def test_csv_files_of_a_folder_follow_each_other_by_name(tmp_path):
    write(tmp_path / "b.csv", "x\n3\n"), write(tmp_path / "a.csv", "x\n1\n2\n")
    assert [row["x"] for row in CsvTable(tmp_path)] == [1, 2, 3]


def test_an_empty_field_needs_a_number_to_stand_for(tmp_path):
    path = write(tmp_path / "t.csv", "a,b\n1,2\n,3\n")
    with pytest.raises(DataError, match="'a' is empty in row 2"):
        CsvTable(path)
    assert CsvTable(path, missing=-1)[1]["a"] == -1
    assert CsvTable(path, columns=["b"])[1] == {"b": 3}


@pytest.mark.parametrize(
    ("text", "settings", "sentence"),
    [
        ("a,b\n1,2\n", {"columns": ["a", "c"]}, "no column 'c'; it has a, b"),
        ("a,b\n1,2\n", {"target": "z"}, "no column 'z'"),
        ("a,b\n1,2\n3\n", {}, "line 3: 1 fields, but the header has 2"),
        ("a,a\n1,2\n", {}, "names the column 'a' twice"),
        ("", {}, "is empty"),
        ("a,y\nhello,1\n", {"target": "y"}, "'a' is text"),
    ],
)
def test_what_is_wrong_in_a_csv_file_is_named(tmp_path, text, settings, sentence):
    with pytest.raises(DataError, match=sentence):
        CsvTable(write(tmp_path / "t.csv", text), **settings)


def test_rows_end_like_a_sequence(tmp_path):
    table = CsvTable(write(tmp_path / "t.csv", "a\n1\n"))
    with pytest.raises(IndexError):
        table[1]


def test_numpy_files_are_mapped_and_go_to_another_process_by_their_path(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(60_000.0).reshape(20, 3000))
    np.save(tmp_path / "y.npy", np.arange(20))
    source = NumpyArrays(tmp_path)
    assert len(source) == 20
    assert source[7]["x"][0] == 21_000 and source[7]["y"] == 7
    again = pickle.dumps(source)
    assert len(again) < 2000
    assert pickle.loads(again)[7]["x"].tolist() == source[7]["x"].tolist()


def test_npz_and_arrays_in_memory_are_rows_by_name(tmp_path):
    arrays = {"a": np.arange(6).reshape(3, 2), "b": np.array([0.5, 1.5, 2.5], np.float32)}
    np.savez(tmp_path / "t.npz", **arrays)
    for source in (NumpyArrays(tmp_path / "t.npz"), NumpyArrays(arrays=arrays)):
        assert source[2]["a"].tolist() == [4, 5] and source[2]["b"] == 2.5
    assert NumpyArrays(arrays={"u": np.ones(3), "v": np.zeros(3), "y": np.arange(3)}, target="y")[1]["target"] == 1


def test_wrong_arrays_are_named(tmp_path):
    with pytest.raises(DataError, match=r"differ in length: \{'a': 2, 'b': 3\}"):
        NumpyArrays(arrays={"a": np.ones(2), "b": np.ones(3)})
    with pytest.raises(DataError, match="'a' is a single number"):
        NumpyArrays(arrays={"a": np.float32(1)})
    with pytest.raises(DataError, match="does not exist"):
        NumpyArrays(tmp_path / "none.npy")
    np.save(tmp_path / "o.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="cannot be mapped"):
        NumpyArrays(tmp_path / "o.npy")
