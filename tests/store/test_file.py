"""What a store of files does when the file system, or its own process, does not go along."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from trainfleet.errors import StoreError
from trainfleet.store import FileStore, write_file
from trainfleet.store import file as file_store


def _files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_making_a_store_touches_nothing(tmp_path):
    store = FileStore(tmp_path / "a" / "b")
    assert store.names() == []
    assert _files(tmp_path) == []


def test_deleting_the_last_name_removes_its_folder_but_never_the_root(tmp_path):
    store = FileStore(tmp_path / "root")
    store.put("a/b/c", b"")
    store.delete("a/b/c")
    assert _files(tmp_path) == ["root"]
    store.put("a/b/c", b"1")
    assert store.get("a/b/c") == b"1"


def test_the_file_is_durable_before_its_name_and_the_name_before_put_returns(tmp_path, monkeypatch):
    acts = []
    fsync, replace = os.fsync, os.replace
    root = tmp_path / "s"

    def watched_fsync(descriptor):
        acts.append(("fsync", str(Path(f"/proc/self/fd/{descriptor}").readlink())))
        fsync(descriptor)

    def watched_replace(source, target):
        acts.append(("rename", str(target)))
        replace(source, target)

    store = FileStore(root)
    store.put("f/first", b"")
    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "replace", watched_replace)
    store.put("f/x", b"abc")
    assert [act for act, _ in acts] == ["fsync", "rename", "fsync"]
    assert "unfinished" in acts[0][1]
    assert acts[1:] == [("rename", str(root / "f" / "x")), ("fsync", str(root / "f"))]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission"),
        (errno.EIO, "device failed"),
        (errno.ESTALE, "network file system"),
        (errno.EBUSY, os.strerror(errno.EBUSY)),
    ],
)
def test_errors_of_the_system_become_sentences_and_leave_no_file(tmp_path, monkeypatch, number, words):
    store = FileStore(tmp_path)
    store.put("x", b"old")

    def failing(_descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(StoreError, match=words) as caught:
        store.put("x", b"new")
    assert isinstance(caught.value.__cause__, OSError)
    with pytest.raises(StoreError, match=words):
        store.put("new/folder/x", b"new")
    monkeypatch.undo()
    assert store.get("x") == b"old"
    assert _files(tmp_path) == ["x"]


def test_a_name_too_long_for_the_file_system_is_said_so(tmp_path):
    with pytest.raises(StoreError, match="too long"):
        FileStore(tmp_path).put("x" * 300, b"")


def test_a_folder_that_vanished_is_not_made_anew(tmp_path):
    store = FileStore(tmp_path / "disk")
    store.put("x", b"")
    (tmp_path / "disk").rename(tmp_path / "unplugged")
    for act in (lambda: store.put("y", b""), store.names, lambda: store.delete("x")):
        with pytest.raises(StoreError, match="vanished"):
            act()
    assert not (tmp_path / "disk").exists()


def test_a_root_on_another_device_is_refused(tmp_path):
    store = FileStore(tmp_path)
    store.put("x", b"")
    store._device += 1
    with pytest.raises(StoreError, match="device is gone"):
        store.put("x", b"")


def test_a_full_disk_is_named_and_the_old_bytes_stand(tmp_path):
    mounted = os.geteuid() == 0 and not subprocess.call(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], stderr=subprocess.DEVNULL
    )
    if not mounted:
        pytest.skip("A small file system could not be mounted: that needs root and the right to mount.")
    try:
        store = FileStore(tmp_path)
        store.put("x", b"old")
        with pytest.raises(StoreError, match="disk is full") as caught:
            store.put("x", (bytes(100_000) for _ in range(20)))
        assert "room" in str(caught.value.hint)
        assert store.get("x") == b"old"
        assert _files(tmp_path) == ["x"]
        store.put("x", bytes(500_000))
    finally:
        subprocess.check_call(["umount", str(tmp_path)])


WRITER = """
import sys, time
from trainfleet.store import FileStore
def chunks():
    yield b"x" * 3_000_000
    print("half", flush=True)
    time.sleep(60)
FileStore(sys.argv[1]).put("dead/x", chunks())
"""


def test_what_a_killed_writer_left_is_swept_and_what_a_living_one_writes_is_not(tmp_path):
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE) for _ in range(2)
    ]
    try:
        for writer in writers:
            assert writer.stdout.readline() == b"half\n"
        assert len(list((tmp_path / "dead").iterdir())) == 2
        assert FileStore(tmp_path).names() == []
        writers[0].kill()
        writers[0].wait(10)
        FileStore(tmp_path).put("y", b"")
        assert len(list((tmp_path / "dead").iterdir())) == 1
        writers[1].kill()
        writers[1].wait(10)
        FileStore(tmp_path).put("y", b"")
        assert _files(tmp_path) == ["y"]
    finally:
        for writer in writers:
            writer.kill()
            writer.wait(10)
            writer.stdout.close()


def test_what_another_host_left_is_swept_after_a_day_only(tmp_path):
    for name, age in (("new", 3600), ("old", 90_000)):
        path = tmp_path / f"{file_store.UNFINISHED}otherhost-{name}"
        path.write_bytes(b"")
        os.utime(path, (time.time() - age,) * 2)
    FileStore(tmp_path).put("y", b"")
    assert _files(tmp_path) == [f"{file_store.UNFINISHED}otherhost-new", "y"]


@pytest.mark.parametrize("name", ["plain", ".dotted", "a b?%2F.x", "mödel"])
def test_a_single_file_is_written_under_the_very_name_given(tmp_path, name):
    place = tmp_path / "new" / "folder" / name
    assert write_file(place, [b"ab", b"c"]) == 3 and place.read_bytes() == b"abc"
    assert [file.name for file in place.parent.iterdir()] == [name]


def test_a_single_file_that_fails_leaves_the_one_before(tmp_path):
    def failing():
        yield b"new"
        raise RuntimeError("midway")

    write_file(tmp_path / "x", b"old")
    with pytest.raises(RuntimeError, match="midway"):
        write_file(tmp_path / "x", failing())
    assert [file.name for file in tmp_path.iterdir()] == ["x"] and (tmp_path / "x").read_bytes() == b"old"
    with pytest.raises(StoreError, match="a folder stands there"):
        write_file(tmp_path, b"")
    with pytest.raises(StoreError, match="a part of the path is a file"):
        write_file(tmp_path / "x" / "y", b"")


def test_a_single_file_sweeps_what_the_dead_left_beside_it_and_nothing_below(tmp_path):
    left = tmp_path / (file_store._unfinished_here() + "dead")
    below = tmp_path / "below" / left.name
    below.parent.mkdir()
    left.touch(), below.touch()
    write_file(tmp_path / "x", b"")
    assert not left.exists() and below.exists()


def test_empty_folders_of_writers_that_died_go_at_the_next_start(tmp_path):
    (tmp_path / "step-00000007" / "deeper").mkdir(parents=True)
    store = FileStore(tmp_path)
    store.put("step-00000008/x", b"1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000008"]


def test_a_folder_swept_while_another_makes_a_file_in_it_is_made_again(tmp_path):
    others = [FileStore(tmp_path) for _ in range(30)]
    stop = threading.Event()

    def sweep():
        try:
            for number, store in enumerate(others):
                store.put(f"other/{number}", b"")
        finally:
            stop.set()

    sweeper = threading.Thread(target=sweep)
    sweeper.start()
    store, count = FileStore(tmp_path), 0
    while not stop.is_set() or not count:
        store.put(f"mine-{count}/x", b"1")
        assert store.get(f"mine-{count}/x") == b"1"
        count += 1
    sweeper.join(20)


def test_folders_that_others_remove_as_empty_are_made_again(tmp_path):
    """As when one rank begins its first save while another tidies."""
    ended = threading.Event()

    def tidy():
        while not ended.is_set():
            FileStore(tmp_path)._sweep()
            time.sleep(0.0005)

    sweepers = [threading.Thread(target=tidy) for _ in range(2)]
    for sweeper in sweepers:
        sweeper.start()
    try:
        store = FileStore(tmp_path)
        for number in range(100):
            store.put(f"a/b-{number}/c", b"x")
            store.delete(f"a/b-{number}/c")
    finally:
        ended.set()
        for sweeper in sweepers:
            sweeper.join()


def test_a_file_in_the_place_of_a_folder_is_told(tmp_path):
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(StoreError, match="Cannot store 'a/b'"):
        FileStore(tmp_path).put("a/b", b"x")


def test_a_folder_that_others_make_and_remove_meanwhile_is_not_in_the_way(tmp_path, monkeypatch):
    folder = tmp_path / "step"
    there = iter([False, True])  # missing at first, there once mkdir has failed, and gone at the next look

    def mkdir(path, *args, **kwargs):
        raise FileExistsError(errno.EEXIST, "another made it", str(path))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    monkeypatch.setattr(Path, "exists", lambda path: path != folder or next(there))
    assert file_store._make_folders(folder, tmp_path) == [folder]


def test_a_file_where_a_folder_belongs_is_said(tmp_path):
    (tmp_path / "step").write_bytes(b"")
    with pytest.raises(StoreError, match="step"):
        FileStore(tmp_path).put("step/shard", b"1")
