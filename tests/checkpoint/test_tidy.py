"""Kills, full disks and leavings: what is whole stays, what is not goes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from held import Held

from trainfleet.checkpoint import Checkpointer, Retention
from trainfleet.checkpoint.sealed import seal
from trainfleet.errors import CheckpointError, StoreError
from trainfleet.store import HOLD, FileStore, MemoryStore


def state(step, length=1000):
    return Held(w=np.full(length, float(step)), step=step)


def whole_step(folder):
    """The step that is restored; what is restored is that step's, all of it."""
    live = state(-1)
    step = Checkpointer(FileStore(folder)).restore(m=live)
    assert live.value["step"] == step
    assert (live.value["w"] == step).all()
    return step


# Goes on from the newest checkpoint and saves two more, pruning the older ones. With a number n it kills itself at
# its n-th act upon the disk: before writing a chunk, an fsync, a rename, an unlink or a rmdir.
RUN = """
import os, signal, sys
import numpy as np
from trainfleet.checkpoint import Checkpointer, Retention
from trainfleet.checkpoint.sealed import RunningDigest
from trainfleet.store import FileStore

folder, deadly = sys.argv[1], int(sys.argv[2])
acts = 0
def counted(function):
    def act(*arguments, **named):
        global acts
        acts += 1
        if acts == deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **named)
    return act
for name in ("fsync", "replace", "rename", "unlink", "rmdir"):
    setattr(os, name, counted(getattr(os, name)))
RunningDigest.update = counted(RunningDigest.update)

class Held:
    def __init__(self, step): self.load_state_dict({"w": np.full(1000, float(step)), "step": step})
    def state_dict(self): return {"w": self.w, "step": self.step}
    def load_state_dict(self, state): self.w, self.step = state["w"], state["step"]

class Here(FileStore): ...  # written by this process, which counts the acts; no other knows the class

live = Held(0)
checkpointer = Checkpointer(Here(folder), retention=Retention(last=2))
checkpointer.restore(m=live)
for step in (live.step + 10, live.step + 20):
    checkpointer.save(step, m=Held(step)).wait()
    print(step, flush=True)
checkpointer.close()
print("acts", acts, flush=True)
"""


def run(folder, deadly):
    """The last step that the run knew to be committed, or None, and how many acts it took if it lived."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(folder), str(deadly)], stdout=subprocess.PIPE, timeout=60, check=False
    )
    assert done.returncode in (0, -signal.SIGKILL)
    words = [line.split() for line in done.stdout.decode().splitlines()]
    steps = [int(w[0]) for w in words if len(w) == 1]
    acts = [int(w[1]) for w in words if len(w) == 2]
    return (steps[-1] if steps else None), (acts[0] if acts else None)


def check_kill(folder, deadly):
    """Kill at that act, twice in a row; whether the first run got so far."""
    known, acts = run(folder, 0)
    assert (known, whole_step(folder)) == (20, 20)
    assert acts is not None
    deadly = deadly % acts + 1
    for _ in range(2):
        before = whole_step(folder)
        known, _ = run(folder, deadly)
        assert whole_step(folder) >= (known or before)
        for step in Checkpointer(FileStore(folder)).steps():
            assert all("not part" in problem for problem in Checkpointer(FileStore(folder)).verify(step))
    known, _ = run(folder, 0)
    assert whole_step(folder) == known
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != HOLD]
    assert len(files) == 2 * 3, "two checkpoints of three files, and nothing that the killed ones left"


@pytest.mark.parametrize("deadly", range(3, 60, 11))
def test_a_kill_at_any_act_leaves_what_was_committed(tmp_path, deadly):
    check_kill(tmp_path, deadly)


@pytest.mark.matrix
@pytest.mark.parametrize("deadly", range(60))
def test_a_kill_at_every_act_leaves_what_was_committed(tmp_path, deadly):
    check_kill(tmp_path, deadly)


def test_kills_at_random_moments_leave_what_was_committed(tmp_path):
    chosen = random.Random(0)
    code = RUN.replace("(live.step + 10, live.step + 20)", "range(live.step + 1, live.step + 100000)")
    committed = 0
    for _ in range(4):
        writer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), "0"], stdout=subprocess.PIPE, text=True)
        try:
            lines = [writer.stdout.readline()]
            time.sleep(chosen.random() * 0.1)
        finally:
            writer.kill()
            lines += writer.stdout.read().splitlines()
            writer.wait(10)
            writer.stdout.close()
        committed = int([line for line in lines if line.strip()][-1])
        assert whole_step(tmp_path) >= committed
    assert committed > 4


def mounted(folder, size):
    return os.geteuid() == 0 and not subprocess.call(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], stderr=subprocess.DEVNULL
    )


def test_a_full_disk_costs_one_save_and_nothing_else(tmp_path):
    if not mounted(tmp_path, "1m"):
        pytest.skip("A small file system could not be mounted: that needs root and the right to mount.")
    checkpointer = Checkpointer(FileStore(tmp_path), retention=Retention(last=9))
    try:
        checkpointer.save(1, m=state(1)).wait()
        files = sorted(p.name for p in tmp_path.rglob("*"))
        save = checkpointer.save(2, m=state(2, length=500_000))
        with pytest.raises(CheckpointError, match=r"Step 2 was not saved: .*the disk is full") as caught:
            save.wait()
        assert "Free some room" in caught.value.hint
        assert sorted(p.name for p in tmp_path.rglob("*")) == files
        assert whole_step(tmp_path) == 1
        checkpointer.save(3, m=state(3)).wait()
        assert whole_step(tmp_path) == 3
    finally:
        checkpointer.close()
        subprocess.check_call(["umount", str(tmp_path)])


def test_a_disk_that_vanishes_is_named(tmp_path):
    checkpointer = Checkpointer(FileStore(tmp_path / "disk"))
    checkpointer.save(1, m=state(1)).wait()
    (tmp_path / "disk").rename(tmp_path / "unplugged")
    with pytest.raises(CheckpointError, match="vanished"):
        checkpointer.save(2, m=state(2)).wait()
    (tmp_path / "unplugged").rename(tmp_path / "disk")
    checkpointer.save(3, m=state(3)).wait()
    assert whole_step(tmp_path / "disk") == 3


# leavings


def test_the_next_save_clears_unfinished_attempts_and_nothing_else():
    store = MemoryStore()
    with Checkpointer(store) as first:
        first.save(1, m=state(1)).wait()
    store.put("step-00000002/0123456789ab.1-00000-of-00002.safetensors", b"half")
    store.put("step-00000002/0123456789ab.1-00001-of-00002.failed", b"{}")
    store.put("step-00000002/notes.txt", b"mine")
    store.put("step-00000001/0123456789ab.1-00000-of-00002.json", b"older")
    store.put("elsewhere/0123456789ab.1-00000-of-00002.json", b"other")
    assert first.steps() == [1]
    with Checkpointer(store) as second:
        second.save(3, m=state(3)).wait()
    left = {name for name in store.names() if not name.startswith("step-00000003")}
    assert "step-00000002/notes.txt" in left
    assert "elsewhere/0123456789ab.1-00000-of-00002.json" in left
    assert not any("0123456789ab" in name for name in left if name.startswith("step"))
    assert second.verify(1) == []


def test_an_unfinished_newer_save_is_named_and_the_whole_one_restored():
    store = MemoryStore()
    with Checkpointer(store) as checkpointer:
        checkpointer.save(1, m=state(1)).wait()
        checkpointer.save(2, m=state(2)).wait()
    store.delete("step-00000002/manifest.json")
    live = state(0)
    checkpointer = Checkpointer(store)
    assert checkpointer.restore(m=live) == 1
    assert checkpointer.problems == ["step-00000002/manifest.json: missing, so the save was not finished"]


def test_a_damaged_checkpoint_is_kept_for_a_person_to_see():
    store = MemoryStore()
    with Checkpointer(store, retention=Retention(last=1)) as checkpointer:
        checkpointer.save(1, m=state(1)).wait()
        store.put("step-00000001/manifest.json", b"{}")
        before = store.names()
        checkpointer.save(2, m=state(2)).wait()
    assert set(before) <= set(store.names())


def test_the_shards_of_an_older_attempt_never_meet_a_newer_manifest():
    """A run dies after its shards and before its manifest; the next one saves the same step."""
    store = MemoryStore()
    with Checkpointer(store) as first:
        first.save(5, m=state(1)).wait()
    store.delete("step-00000005/manifest.json")
    with Checkpointer(store) as second:
        second.save(5, m=state(2)).wait()
    manifest = json.loads(store.get("step-00000005/manifest.json"))
    assert all(file["name"].startswith(manifest["run"]) for file in manifest["indexes"])
    assert second.verify(5) == []
    live = state(0)
    second.restore(m=live)
    assert (live.value["w"] == 2).all()


def test_a_store_that_cannot_delete_fails_no_save(caplog):
    class Stuck(MemoryStore):
        def delete(self, name):
            raise StoreError("Cannot delete: permission is denied.")

    store = Stuck()
    with Checkpointer(store, retention=Retention(last=1)) as checkpointer:
        checkpointer.save(1, m=state(1)).wait()
        checkpointer.save(2, m=state(2)).wait()
    assert checkpointer.steps() == [1, 2]
    assert "Could not remove old checkpoints: Cannot delete" in caplog.text


def test_a_clock_that_goes_backwards_confuses_nothing(monkeypatch):
    store, clock = MemoryStore(), iter(range(2_000_000_000, 0, -400_000_000))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    with Checkpointer(store, retention=Retention(last=2)) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, m=state(step)).wait()
    assert checkpointer.steps() == [2, 3]
    assert Checkpointer(store).restore(m=state(0)) == 3


def test_a_checkpoint_of_a_newer_version_is_neither_removed_nor_passed_over():
    store = MemoryStore()
    with Checkpointer(store) as checkpointer:
        checkpointer.save(1, m=state(1)).wait()
    body = json.loads(store.get("step-00000001/manifest.json"))
    del body["digest"], body["kind"]
    store.put("step-00000001/manifest.json", seal("manifest", {**body, "format": 99}))
    before = store.names()
    with Checkpointer(store, retention=Retention(last=1)) as checkpointer:
        for step in (2, 3):
            checkpointer.save(step, m=state(step)).wait()
    assert set(before) < set(store.names()) and checkpointer.steps() == [1, 3]
    with pytest.raises(CheckpointError, match="has format 99, and this trainfleet reads formats up to 1"):
        Checkpointer(store).restore(m=state(0))


def test_the_only_whole_one_outlives_saves_that_fail():
    """Whatever the retention says: it removes after a commit, never before."""

    class Full(MemoryStore):
        is_full = False

        def put(self, name, data):
            if self.is_full and name.endswith("manifest.json"):
                raise StoreError("Cannot store: the disk is full.")
            return super().put(name, data)

    store = Full()
    with Checkpointer(store, retention=Retention(last=1)) as checkpointer:
        checkpointer.save(1, m=state(1)).wait()
        store.is_full = True
        for step in (2, 3, 4):
            with pytest.raises(CheckpointError, match="full"):
                checkpointer.save(step, m=state(step)).wait()
        assert checkpointer.steps() == [1] and checkpointer.verify(1) == []
        store.is_full = False
        checkpointer.save(5, m=state(5)).wait()
    assert checkpointer.steps() == [5] and checkpointer.verify(5) == []


def cut_short(store, name):
    store.put(name, store.get(name)[:-1])


def flip(store, name):
    data = bytearray(store.get(name))
    data[-1] ^= 1
    store.put(name, bytes(data))


@pytest.mark.parametrize("harm", [cut_short, MemoryStore.delete])
@pytest.mark.parametrize("kind", [".safetensors", ".json"])
def test_what_lacks_a_file_or_a_part_of_one_is_not_counted_as_whole(harm, kind):
    store = MemoryStore()
    with Checkpointer(store, retention=Retention(last=2)) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, m=state(step)).wait()
        (name,) = [name for name in store.names("step-00000002/") if name.endswith(kind) and "manifest" not in name]
        harm(store, name)
        checkpointer.save(3, m=state(3)).wait()
        assert checkpointer.steps() == [1, 2, 3] and checkpointer.verify(1) == []
        checkpointer.save(4, m=state(4)).wait()
        assert checkpointer.steps() == [3, 4]


@pytest.mark.parametrize("find", ["restore", "verify"])
def test_damage_that_was_found_is_remembered_until_the_step_is_saved_again(find, tmp_path):
    store = FileStore(tmp_path)
    with Checkpointer(store, retention=Retention(last=9)) as first:
        for step in (1, 2):
            first.save(step, m=state(step)).wait()
    (name,) = [name for name in store.names("step-00000002/") if name.endswith(".safetensors")]
    flip(store, name)  # which its size does not tell
    with Checkpointer(store, retention=Retention(last=2)) as checkpointer:
        if find == "restore":
            assert checkpointer.restore(m=state(0)) == 1
        else:
            assert checkpointer.verify(2)
        checkpointer.save(3, m=state(3)).wait()
        assert checkpointer.steps() == [1, 2, 3]
        checkpointer.save(2, m=state(2)).wait()  # anew: whole, and the newest
        assert checkpointer.steps() == [2, 3] and checkpointer.verify(2) == []


def test_a_checkpoint_of_a_newer_version_counts_as_whole_also_after_a_look_at_it():
    store = MemoryStore()
    with Checkpointer(store, retention=Retention(last=2)) as checkpointer:
        checkpointer.save(1, m=state(1)).wait()
        checkpointer.save(2, m=state(2)).wait()
        ours = store.get("step-00000002/manifest.json")
        store.put("step-00000002/manifest.json", seal("manifest", {"format": 99}))
        with pytest.raises(CheckpointError, match="newer"):
            checkpointer.verify(2)
        store.put("step-00000002/manifest.json", ours)
        checkpointer.save(3, m=state(3)).wait()
        assert checkpointer.steps() == [2, 3]
