"""A store is one run's at a time, and says whose; a dead run holds nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta

import pytest

from trainfleet.errors import StoreError
from trainfleet.store import FileStore, MemoryStore
from trainfleet.store.hold import HOLD, holder, this_process

AT_ONCE = timedelta(0)

HOLDER = """
import sys, time
from trainfleet.store import FileStore
hold = FileStore(sys.argv[1]).hold()
print("held", flush=True)
time.sleep(60)
"""


def holder_of(folder):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_the_second_run_is_told_whose_the_folder_is(tmp_path):
    process = holder_of(tmp_path / "a")
    try:
        with pytest.raises(StoreError) as caught:
            FileStore(tmp_path / "a").hold(AT_ONCE)
        assert str(tmp_path / "a") in str(caught.value) and f"process {process.pid} on" in str(caught.value)
        assert "another folder" in caught.value.hint
    finally:
        process.kill()
        process.communicate()


def test_a_killed_holder_holds_nothing(tmp_path):
    process = holder_of(tmp_path)
    process.kill()
    process.communicate()
    FileStore(tmp_path).hold(AT_ONCE).close()


def test_a_hold_lasts_while_another_process_shares_its_descriptor(tmp_path):
    hold = FileStore(tmp_path).hold()
    sharer = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[hold.descriptor])
    hold.close()
    with pytest.raises(StoreError):
        FileStore(tmp_path).hold(AT_ONCE)
    sharer.communicate(b"\n")
    FileStore(tmp_path).hold(AT_ONCE).close()


@pytest.mark.parametrize("make", [FileStore, lambda folder: MemoryStore()], ids=["files", "memory"])
def test_what_was_let_go_can_be_held_again(tmp_path, make):
    store = make(tmp_path)
    hold = store.hold()
    with pytest.raises(StoreError):
        store.hold(AT_ONCE)
    hold.close()
    hold.close()
    again = store.hold(AT_ONCE)
    del again  # one that nobody closes goes with its object
    store.hold(AT_ONCE).close()


def test_holding_is_no_stored_name_and_hinders_no_reader(tmp_path):
    store = FileStore(tmp_path)
    store.put("a", b"1")
    hold = store.hold()
    assert FileStore(tmp_path).names() == ["a"] and FileStore(tmp_path).get("a") == b"1"
    assert (tmp_path / HOLD).exists()
    hold.close()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    if os.geteuid() == 0:
        (tmp_path / "file").write_bytes(b"")
        place = tmp_path / "file"  # root may write everywhere, but not below a file
    else:
        place = tmp_path / "closed"
        place.mkdir(mode=0o500)
    with pytest.raises(StoreError, match=str(place)):
        FileStore(place).hold(AT_ONCE)


def test_a_process_describes_itself():
    assert f"process {os.getpid()} on {os.uname().nodename} since 20" in this_process()


def test_whoever_asks_is_told_the_holder_and_hinders_nobody(tmp_path):
    assert holder(tmp_path) is None and list(tmp_path.iterdir()) == []
    hold = FileStore(tmp_path).hold()
    assert f"process {os.getpid()} on " in (holder(tmp_path) or "")
    hold.close()
    assert holder(tmp_path) is None
    FileStore(tmp_path).hold(AT_ONCE).close()
