"""What every store promises, asked of each in turn."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainfleet.errors import NotStored, StoreError
from trainfleet.store import FileStore, MemoryStore, Store

ODD_NAMES = [
    "a b",
    ".hidden",
    "..dots",
    "%2E",
    "100%",
    "ü",
    "new\nline",
    "q?*:<>|",
    "a\\b",
    "~",
    "-rf",
    "\x00",
    "A",
]


@pytest.fixture(params=["memory", "file"])
def store(request, tmp_path) -> Store:
    return MemoryStore() if request.param == "memory" else FileStore(tmp_path / "store")


def test_it_is_a_store_of_six_methods(store):
    assert isinstance(store, Store)


def test_what_was_put_is_got(store):
    assert store.put("a/b.bin", b"abc") == 3
    assert store.get("a/b.bin") == b"abc"
    assert store.exists("a/b.bin")


def test_buffers_of_all_kinds_are_joined(store):
    array = np.arange(3, dtype=np.uint8)
    assert store.put("x", iter([b"1", bytearray(b"2"), memoryview(array), b""])) == 5
    assert store.get("x") == b"12\x00\x01\x02"


def test_a_put_replaces_the_whole(store):
    store.put("x", b"a long first value")
    store.put("x", b"b")
    assert store.get("x") == b"b"


def test_nothing_is_stored_when_the_buffers_fail_midway(store):
    def failing():
        yield b"half"
        raise RuntimeError("no more")

    store.put("old", b"old")
    for name in ("old", "new"):
        with pytest.raises(RuntimeError):
            store.put(name, failing())
    assert store.get("old") == b"old"
    assert store.names() == ["old"]


def test_what_is_absent_is_said_to_be(store):
    store.put("folder/x", b"")
    for name in ("nothing", "folder", "folder/y", "folder/x/z"):
        assert not store.exists(name)
        with pytest.raises(NotStored, match=name):
            store.get(name)
        with pytest.raises(NotStored, match=name):
            store.open(name)


def test_ranges_are_read_into_a_buffer(store):
    store.put("x", bytes(range(100)))
    with store.open("x") as opened:
        assert opened.size == 100
        buffer = bytearray(5)
        opened.read_into(95, buffer)
        assert buffer == bytes(range(95, 100))
        with pytest.raises(StoreError, match="'x'"):
            opened.read_into(96, buffer)


def test_what_is_open_stays_what_it_was(store):
    store.put("x", b"old")
    with store.open("x") as opened:
        store.put("x", b"new")
        buffer = bytearray(3)
        opened.read_into(0, buffer)
    assert buffer == b"old"


def test_names_are_those_with_the_prefix_in_order(store):
    assert store.names() == []
    for name in ("b", "a/2", "a/1", "ab/3", "a/c/4"):
        store.put(name, b"")
    assert store.names() == ["a/1", "a/2", "a/c/4", "ab/3", "b"]
    assert store.names("a") == ["a/1", "a/2", "a/c/4", "ab/3"]
    assert store.names("a/") == ["a/1", "a/2", "a/c/4"]
    assert store.names("a/c") == ["a/c/4"]
    assert store.names("z/") == []


def test_deleting_leaves_the_others_and_may_be_repeated(store):
    store.put("a/1", b"1")
    store.put("a/2", b"2")
    store.delete("a/1")
    store.delete("a/1")
    store.delete("never/was")
    assert store.names() == ["a/2"]


def test_odd_names_come_back_as_they_were(store):
    for name in ODD_NAMES:
        store.put(f"odd/{name}", name.encode())
    assert store.names("odd/") == sorted(f"odd/{name}" for name in ODD_NAMES)
    assert all(store.get(f"odd/{name}") == name.encode() for name in ODD_NAMES)


@pytest.mark.parametrize("name", ["", "/a", "a/", "a//b", ".", "..", "a/../b", "../x", "a/./b", "\ud800"])
def test_names_that_lead_elsewhere_are_refused(store, name):
    for act in (store.get, store.open, store.exists, store.delete, lambda n: store.put(n, b"")):
        with pytest.raises(StoreError, match="cannot be a name"):
            act(name)


def test_no_name_is_the_folder_of_another(store):
    store.put("a", b"")
    with pytest.raises(StoreError, match="a/b"):
        store.put("a/b", b"")
    store.put("c/d", b"")
    with pytest.raises(StoreError, match="'c'"):
        store.put("c", b"")
    assert store.names() == ["a", "c/d"]


def test_of_concurrent_writers_one_wins_whole(store):
    values = [bytes([n]) * 200_000 for n in range(4)]
    seen = []

    def write(value):
        for _ in range(5):
            store.put("x", (value[i : i + 10_000] for i in range(0, len(value), 10_000)))
            seen.append(store.get("x"))

    threads = [threading.Thread(target=write, args=(value,)) for value in values]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert set(seen) <= set(values)
    assert store.names() == ["x"]


@given(st.lists(st.text(min_size=1).filter(lambda s: "/" not in s and s not in (".", "..")), min_size=1, max_size=3))
def test_file_names_are_safe_and_tell_names_apart(parts):
    store = FileStore("/somewhere")
    try:
        path = store.path_of("/".join(parts))
    except StoreError:
        assert any(0xD800 <= ord(c) < 0xE000 for c in "".join(parts))
        return
    below = path.relative_to("/somewhere").parts
    assert len(below) == len(parts)
    assert not any(part.startswith(".") or "\x00" in part for part in below)
    assert len({store.path_of("/".join(parts)), store.path_of("/".join(parts) + "x")}) == 2
