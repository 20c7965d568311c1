from __future__ import annotations

import pickle

import numpy as np
import pytest

from trainfleet.data.text import TextWindows
from trainfleet.errors import DataError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_bytes(bytes(range(100)))
    (tmp_path / "b.txt").write_bytes(b"")
    (tmp_path / "sub" / "c.txt").write_bytes(bytes(range(100, 250)))
    (tmp_path / "other.md").write_bytes(b"x" * 1000)
    return tmp_path


@pytest.mark.parametrize("mapped", [False, True])
def test_windows_run_over_the_files_in_name_order(folder, mapped, monkeypatch):
    if mapped:
        monkeypatch.setattr("trainfleet.data.text.IN_MEMORY_BYTES", 0)
    source = TextWindows(folder, length=16)
    assert len(source) == (250 - 1) // 16
    for each in (source, pickle.loads(pickle.dumps(source))):
        for i in range(len(source)):
            assert each[i]["input"].tolist() == list(range(16 * i, 16 * i + 16))
            assert each[i]["target"].tolist() == list(range(16 * i + 1, 16 * i + 17))
    assert source[0]["input"].dtype == source[0]["target"].dtype == np.int64
    with pytest.raises(IndexError):
        source[len(source)]


def test_parts_share_no_byte_and_leave_none_out(folder):
    train = TextWindows(folder, length=1, part=(0.0, 0.8))
    held_out = TextWindows(folder, length=1, part=(0.8, 1.0))
    assert train[len(train) - 1]["target"].tolist() == [199] and held_out[0]["input"].tolist() == [200]


def test_windows_may_overlap(folder):
    source = TextWindows(folder, length=16, stride=4)
    assert source[1]["input"][0] == 4 and source[len(source) - 1]["target"][-1] <= 249


def test_a_tokenizer_makes_them_windows_of_tokens(tmp_path):
    (tmp_path / "a.txt").write_text("to be or not to be that is the question")
    source = TextWindows(tmp_path / "a.txt", length=3, tokenizer=lambda text: [len(word) for word in text.split()])
    assert source[0]["input"].tolist() == [2, 2, 2] and source[0]["target"].tolist() == [2, 2, 3]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"length": 250}, "holds 250 bytes, fewer than one window of 250"),
        ({"length": 0}, "length 0"),
        ({"length": 4, "part": (0.5, 0.5)}, "two fractions in order"),
        ({"length": 4, "pattern": "*.rst"}, r"No text file matches '\*.rst'"),
        ({"length": 4, "tokenizer": lambda text: [int(text)]}, "tokenizer failed on .*a.txt: ValueError"),
    ],
)
def test_what_cannot_be_cut_is_refused(folder, settings, sentence):
    with pytest.raises(DataError, match=sentence):
        TextWindows(folder, **settings)
