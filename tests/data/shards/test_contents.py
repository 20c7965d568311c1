"""Files become samples as WebDataset has it, and what is kept of that is believed only where it can be so."""

from __future__ import annotations

import json
import tempfile

import pytest
from data.shards.made import tarred
from hypothesis import given, settings
from hypothesis import strategies as st

from trainfleet.data.shards.cache import Damaged
from trainfleet.data.shards.contents import Contents, find_contents


def found(files):
    data = tarred(files)
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        return find_contents(file.fileno(), len(data)), data


def test_files_that_follow_each_other_with_one_key_are_a_sample():
    names = ["a/1.jpg", "a/1.seg.PNG", "b/1.jpg", "2.cls", "2.txt", "a/1.cls"]
    contents, data = found({name: name.encode() for name in names})
    assert contents.keys == ["a/1", "b/1", "2", "a/1"]
    assert [sorted(contents.files(i)) for i in range(4)] == [["jpg", "seg.png"], ["jpg"], ["cls", "txt"], ["cls"]]
    begin, size = contents.files(0)["seg.png"]
    assert data[begin : begin + size] == b"a/1.seg.PNG"


def test_files_that_belong_to_no_sample_are_left_out():
    names = ["README", ".hidden", "a/.hidden.txt", "__meta__", "__meta__/x.json", "dir.d/1.txt"]
    assert found(dict.fromkeys(names, b""))[0].keys == ["dir.d/1"]


def test_two_files_of_one_name_in_a_sample_are_damage():
    with pytest.raises(Damaged, match=r"sample 'a' has two files 'jpg'"):
        found({"a.jpg": b"1", "a.JPG": b"2"})


def test_an_empty_archive_has_no_samples():
    assert len(found({})[0]) == 0


def test_contents_come_back_from_json():
    contents, data = found({"a.jpg": b"1", "b.jpg": b"2", "b.cls": b"3"})
    again = Contents.from_json(contents.to_json(), len(data))
    assert again.keys == contents.keys and [again.files(i) for i in (0, 1)] == [contents.files(i) for i in (0, 1)]
    assert Contents.from_json(contents.to_json(), len(data) + 1) is None, "of another archive"


JSON = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=3)
    | st.lists(st.integers(-3, 9) | st.text(), max_size=4)
)


@settings(max_examples=300)
@given(name=st.sampled_from(["format", "num_bytes", "keys", "endings", "first", "ending", "begin", "size"]), value=JSON)
def test_garbled_contents_are_not_believed(name, value):
    contents, data = found({"a.jpg": b"1", "b.jpg": b"2", "b.cls": b"3"})
    plain = json.loads(contents.to_json()) | {name: value}
    again = Contents.from_json(json.dumps(plain), len(data))
    if again is not None:
        for row in range(len(again)):
            assert all(0 <= begin <= begin + size <= len(data) for begin, size in again.files(row).values())
