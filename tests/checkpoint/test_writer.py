"""The writer is a process of its own that carries out saves, and dies with its rank."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import psutil
import pytest
from held import Held

from trainfleet.checkpoint import Checkpointer, Retention
from trainfleet.checkpoint.writer import CAN_RUN, Writer, WriterLost
from trainfleet.comm.threads import run_ranks
from trainfleet.errors import CheckpointError, StoreError
from trainfleet.state import ShardedArray
from trainfleet.store import FileStore, MemoryStore

pytestmark = pytest.mark.skipif(not CAN_RUN, reason="this system has no writer processes: no memfd or no pidfd")

SHORT = timedelta(seconds=20)


def children():
    return [child.pid for child in psutil.Process().children()]


def descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


def writer_of(checkpointer):
    pid = checkpointer._writer.pid
    assert pid is not None
    return pid


def restored(folder, size):
    live = Held(w=np.zeros(size))
    step = Checkpointer(FileStore(folder)).restore(m=live)
    return step, live.value["w"]


def test_a_store_that_others_can_reach_is_written_by_a_process_without_torch(tmp_path):
    with Checkpointer(FileStore(tmp_path)) as checkpointer:
        checkpointer.save(1, m=Held(w=np.arange(1000.0))).wait()
        maps = Path(f"/proc/{writer_of(checkpointer)}/maps").read_text()
        assert "numpy" in maps and "torch" not in maps
    assert (restored(tmp_path, 1000)[1] == np.arange(1000.0)).all()


def test_a_store_of_this_process_is_written_by_a_thread():
    before = children()
    with Checkpointer(MemoryStore()) as checkpointer:
        checkpointer.save(1, m=Held(w=np.arange(10.0))).wait()
        assert children() == before


def test_larger_states_get_larger_memory_and_the_same_process(tmp_path):
    with Checkpointer(FileStore(tmp_path)) as checkpointer:
        pids = set()
        for step, size in enumerate((10, 100_000, 50, 200_000)):
            checkpointer.save(step, m=Held(w=np.full(size, float(step)))).wait()
            pids.add(writer_of(checkpointer))
            assert (restored(tmp_path, size)[1] == step).all()
        assert len(pids) == 1


def test_a_writer_hears_of_new_arrays_and_a_new_writer_of_all(tmp_path):
    with Checkpointer(FileStore(tmp_path), retention=Retention(last=9)) as checkpointer:
        checkpointer.prepare(m=Held(w=np.zeros((100, 100))))
        shapes = [(10,), (10,), (2, 5), (10,), (10,), (100, 100)]
        for step, shape in enumerate(shapes):
            if step == 4:
                os.kill(writer_of(checkpointer), signal.SIGKILL)
                psutil.Process(writer_of(checkpointer)).wait(5)
            checkpointer.save(step, m=Held(w=np.full(shape, float(step)))).wait(SHORT)
    for step, shape in enumerate(shapes):
        live = Held(w=np.zeros(shape))
        assert Checkpointer(FileStore(tmp_path)).restore(step, m=live) == step
        assert (live.value["w"] == step).all()


def test_close_leaves_no_process_no_descriptor_and_no_hold(tmp_path):
    processes, opened = children(), descriptors()
    with Checkpointer(FileStore(tmp_path)) as checkpointer:
        checkpointer.save(1, m=Held(w=np.arange(1000.0))).wait()
    assert children() == processes and descriptors() == opened
    FileStore(tmp_path).hold(timedelta(0)).close()


def test_one_that_nobody_closes_goes_with_its_object(tmp_path):
    processes = children()
    checkpointer = Checkpointer(FileStore(tmp_path))
    checkpointer.save(1, m=Held(w=np.arange(1000.0))).wait()
    assert len(children()) == len(processes) + 1
    del checkpointer
    assert children() == processes


def test_a_killed_writer_fails_its_save_and_the_next_one_has_another(tmp_path):
    with Checkpointer(FileStore(tmp_path)) as checkpointer:
        checkpointer.save(1, m=Held(w=np.arange(1000.0))).wait()
        first = writer_of(checkpointer)
        os.kill(first, signal.SIGSTOP)
        save = checkpointer.save(2, m=Held(w=np.zeros(1000)))
        os.kill(first, signal.SIGKILL)
        with pytest.raises(CheckpointError, match="Step 2 was not saved: its writer process was killed by SIGKILL"):
            save.wait(SHORT)
        assert restored(tmp_path, 1000)[0] == 1
        checkpointer.save(3, m=Held(w=np.ones(1000))).wait(SHORT)
        assert writer_of(checkpointer) != first and restored(tmp_path, 1000)[0] == 3


def test_a_writer_that_stands_still_is_ended_at_the_deadline(tmp_path):
    with Checkpointer(FileStore(tmp_path), timeout=timedelta(seconds=0.5)) as checkpointer:
        checkpointer.save(1, m=Held(w=np.arange(10.0))).wait()
        os.kill(writer_of(checkpointer), signal.SIGSTOP)
        save = checkpointer.save(2, m=Held(w=np.zeros(10)))
        with pytest.raises(CheckpointError, match="was not done after 1 s"):
            save.wait(SHORT)
        checkpointer.save(3, m=Held(w=np.ones(10))).wait(SHORT)


def test_ctrl_c_and_sigterm_do_not_end_a_save(tmp_path):
    with Checkpointer(FileStore(tmp_path)) as checkpointer:
        checkpointer.prepare(m=Held(w=np.zeros(10)))
        checkpointer.save(1, m=Held(w=np.zeros(10))).wait()
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(writer_of(checkpointer), number)
        checkpointer.save(2, m=Held(w=np.zeros(10))).wait(SHORT)


RANK = """
import sys, time
import numpy as np
from trainfleet.checkpoint import Checkpointer
from trainfleet.store import FileStore

class Held:
    def state_dict(self):
        return {"w": np.zeros(10)}
    def load_state_dict(self, state): ...

checkpointer = Checkpointer(FileStore(sys.argv[1]))
checkpointer.save(1, m=Held()).wait()
print(checkpointer._writer.pid, flush=True)
time.sleep(60)
"""


def test_a_writer_dies_with_its_rank(tmp_path):
    rank = subprocess.Popen([sys.executable, "-c", RANK, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    writer = psutil.Process(int(rank.stdout.readline()))
    rank.kill()
    rank.communicate()
    deadline = time.monotonic() + 5
    while writer.is_running() and writer.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not writer.is_running() or writer.status() == psutil.STATUS_ZOMBIE
    FileStore(tmp_path).hold().close()


def test_what_the_writer_warns_of_is_logged_here(tmp_path, caplog):
    with Checkpointer(FileStore(tmp_path)) as checkpointer:
        checkpointer.save(1, m=Held(w=np.zeros(10))).wait()
        (tmp_path / "step-00000001" / "manifest.json").unlink()
        (tmp_path / "step-00000001" / "manifest.json").mkdir()
        (tmp_path / "step-00000001" / "manifest.json" / "x").touch()
        with pytest.raises(CheckpointError):
            checkpointer.save(1, m=Held(w=np.zeros(10))).wait(SHORT)


def test_the_memory_can_be_had_before_the_first_save(tmp_path):
    with Checkpointer(FileStore(tmp_path)) as checkpointer:
        checkpointer.prepare(m=Held(w=np.zeros(1000)))
        assert checkpointer._memory.num_bytes >= 8000 and writer_of(checkpointer)
        assert not checkpointer.has_checkpoint()
        checkpointer.save(1, m=Held(w=np.zeros(1000))).wait()


FORKING = """
import os, sys, time
import numpy as np
from trainfleet.checkpoint import Checkpointer
from trainfleet.store import FileStore

class Held:
    def state_dict(self):
        return {"w": np.zeros(10)}
    def load_state_dict(self, state): ...

checkpointer = Checkpointer(FileStore(sys.argv[1]))
checkpointer.save(1, m=Held()).wait()
child = os.fork()  # as a loader of data forks its workers
if not child:
    os.close(1)
    time.sleep(60)
    os._exit(0)
if sys.argv[2] == "close":
    begun = time.monotonic()
    checkpointer.close()
    print(child, time.monotonic() - begun, flush=True)
else:
    print(child, 0, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("end", ["close", "kill"])
def test_children_that_the_rank_forked_keep_neither_writer_nor_store(tmp_path, end):
    rank = subprocess.Popen([sys.executable, "-c", FORKING, str(tmp_path), end], stdout=subprocess.PIPE, text=True)
    child, seconds = rank.stdout.readline().split()
    try:
        assert float(seconds) < 2
        if end == "kill":
            rank.kill()
        rank.communicate(timeout=20)
        FileStore(tmp_path).hold(timedelta(seconds=2)).close()
        assert psutil.pid_exists(int(child)), "the child lived on while the store was held again"
    finally:
        os.kill(int(child), signal.SIGKILL)


def test_a_writer_that_cannot_wait_for_its_rank_looks_for_it(tmp_path, monkeypatch):
    """As in a sandbox without pidfd."""
    folder = tmp_path / "patched"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text("import os\ndel os.pidfd_open\n")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    # The child has the socket too, so that this tells the writer nothing.
    test_children_that_the_rank_forked_keep_neither_writer_nor_store(tmp_path / "store", "kill")


def test_without_memory_or_processes_a_save_says_so_and_nothing_is_left(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EMFILE, "Too many open files")

    opened = descriptors()
    with Checkpointer(FileStore(tmp_path)) as checkpointer:
        with (
            monkeypatch.context() as patched,
            pytest.raises(CheckpointError, match=r"no memory .* Too many open"),
        ):
            patched.setattr(os, "memfd_create", refuse)
            checkpointer.save(1, m=Held(w=np.zeros(10)))
        with monkeypatch.context() as patched, pytest.raises(CheckpointError, match="could not be started"):
            patched.setattr(subprocess, "Popen", refuse)
            checkpointer.save(2, m=Held(w=np.zeros(10)))
        checkpointer.save(3, m=Held(w=np.zeros(10))).wait(SHORT)
        assert checkpointer.steps() == [3]
    assert descriptors() == opened


def test_a_rank_whose_writer_is_lost_after_its_shard_stands_takes_nothing_back(tmp_path, monkeypatch, caplog):
    """Rank 0 may have published it."""
    lost = threading.Event()

    def write(self, order, memory, timeout, write=Writer.write):
        write(self, order, memory, timeout)
        if order.rank == 1:
            lost.set()
            raise WriterLost("its writer process was killed by SIGKILL.")

    monkeypatch.setattr(Writer, "write", write)

    def save(group):
        with Checkpointer(FileStore(tmp_path), group=group, timeout=SHORT) as checkpointer:
            piece = ShardedArray(name="w", global_shape=(4,), offsets=(2 * group.rank,), local=np.full(2, group.rank))
            checkpointer.save(1, m=Held(w=piece)).wait(SHORT)

    run_ranks(2, save)
    assert lost.is_set() and "All is stored, but the writer was lost" in caplog.text
    assert Checkpointer(FileStore(tmp_path)).verify(1) == []


def saves_under_fire(folder, seed):
    """Two ranks save eight times while writers are killed at random moments; per rank, the steps that went well."""
    chosen = random.Random(seed)
    pids, over = {}, threading.Event()

    def shoot():
        while not over.wait(chosen.random() * 0.15):
            rank = chosen.randrange(2)
            with contextlib.suppress(KeyError, ProcessLookupError):
                os.kill(pids[rank], signal.SIGKILL)

    def save(group):
        whole, good = np.arange(60_000.0), []
        with Checkpointer(FileStore(folder), retention=Retention(last=99), group=group, timeout=SHORT) as checkpointer:
            for step in range(1, 10):
                if step == 9:
                    over.set()  # the last one is left in peace
                    group.barrier()
                half = whole[30_000 * group.rank :][:30_000] + step
                piece = ShardedArray(name="w", global_shape=(60_000,), offsets=(30_000 * group.rank,), local=half)
                under_way = checkpointer.save(step, m=Held(w=piece, step=step))
                if (pid := checkpointer._writer.pid) is not None:  # None where it is dead already
                    pids[group.rank] = pid
                try:
                    under_way.wait(SHORT)
                    good.append(step)
                except CheckpointError as error:
                    assert re.search(f"Step {step} was not saved: .*(was killed by SIGKILL|rank 1 failed)", str(error))
        return good

    shooter = threading.Thread(target=shoot)
    shooter.start()
    try:
        return run_ranks(2, save)
    finally:
        over.set()
        shooter.join()


def check_fire(folder, seed):
    good, _ = saves_under_fire(folder, seed)
    checkpointer = Checkpointer(FileStore(folder))
    assert good == checkpointer.steps(), "what rank 0 was told is what stands"
    assert good[-1] == 9
    for step in good:
        assert checkpointer.verify(step) == []
        live = Held(w=np.zeros(60_000), step=0)
        assert checkpointer.restore(step, m=live) == live.value["step"] == step
        assert (live.value["w"] == np.arange(60_000.0) + step).all()
    # A writer may be killed between making a folder and making a file in it; an empty folder is nothing.
    left = {path.parent.name for path in folder.glob("*/*")}
    assert left == {f"step-{step:08d}" for step in good}
    return good


@pytest.mark.parametrize("seed", range(3))
def test_writers_killed_at_any_moment_spoil_their_own_save_and_nothing_else(tmp_path, seed):
    check_fire(tmp_path, seed)


@pytest.mark.matrix
@pytest.mark.parametrize("seed", range(3, 53))
def test_writers_killed_at_fifty_more_moments(tmp_path, seed):
    check_fire(tmp_path, seed)


def test_two_runs_do_not_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(FileStore.hold, "__defaults__", (timedelta(0),))
    with Checkpointer(FileStore(tmp_path)) as first:
        first.save(1, m=Held(w=np.zeros(10))).wait()
        second = Checkpointer(FileStore(tmp_path))
        with pytest.raises(StoreError, match=f"{tmp_path} is in use by process {os.getpid()} on .* since 20"):
            second.save(2, m=Held(w=np.zeros(10)))
        assert second.restore(m=Held(w=np.zeros(10))) == 1, "it may read"
    with second:
        second.save(2, m=Held(w=np.zeros(10))).wait()
    assert first.steps() == [1, 2]


@pytest.mark.parametrize("name", ["a b#c%20?", "ünï \u2028 zeile\n2", "-rf", os.fsdecode(b"latin\xe9")])
def test_folders_of_any_name_are_written(tmp_path, name):
    folder = tmp_path / name
    with Checkpointer(FileStore(folder)) as checkpointer:
        checkpointer.save(1, **{"a/b ~#": Held(**{"w/é\n": np.arange(10.0), "..": 1})}).wait(SHORT)
        assert checkpointer.verify(1) == [] and (folder / "step-00000001" / "manifest.json").exists()
    live = Held(**{"w/é\n": np.zeros(10), "..": 0})
    assert Checkpointer(FileStore(folder)).restore(**{"a/b ~#": live}) == 1
    assert live.value["w/é\n"][9] == 9 and live.value[".."] == 1


def test_preparing_for_more_waits_for_the_save_under_way(tmp_path):
    with Checkpointer(FileStore(tmp_path)) as checkpointer:
        for step in range(5):
            save = checkpointer.save(step, m=Held(w=np.full(100_000, float(step))))
            checkpointer.prepare(m=Held(w=np.zeros(200_000 + step * 100_000)))
            assert save.done and checkpointer.verify(step) == []
            assert (restored(tmp_path, 100_000)[1] == step).all()
