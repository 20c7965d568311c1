from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import psutil
import pytest

from trainfleet.data.loader import LocalBatches
from trainfleet.errors import DataError


class Rows:
    """Big enough rows that batches go through shared memory; some rows do something to their process."""

    def __init__(self, length=200, deeds=(), marks=None):
        self.length, self.deeds, self.marks = length, dict(deeds), marks

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        deed = self.deeds.get(index)
        if deed is not None and multiprocessing.parent_process() is not None:
            if self.marks is not None:  # once: the file says it was done
                mark = Path(self.marks) / str(index)
                deed = None if mark.exists() else deed
                mark.touch()
            if deed is not None:
                deed()
        return {"i": index, "x": np.full(3000, index, np.float32)}


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def segfault():
    import faulthandler

    faulthandler.disable()
    os.kill(os.getpid(), signal.SIGSEGV)


def leave():
    os._exit(3)


def hang():
    time.sleep(600)


def open_stream(source, **settings):
    return LocalBatches(source, size=5, shuffle=False, collate="numpy", **{"workers": 2, **settings})


def firsts(stream, count):
    batches = [next(stream) for _ in range(count)]
    assert all((b["x"] == b["i"][:, None]).all() for b in batches)
    return [int(b["i"][0]) for b in batches]


def alive(pids):
    def lives(pid):
        try:
            return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:  # perhaps just now
            return False

    return [pid for pid in pids if lives(pid)]


def wait_until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


@pytest.mark.parametrize("start_method", ["fork", "forkserver"])
def test_workers_start_by_fork_and_by_fork_server(start_method):
    with open_stream(Rows(), start_method=start_method) as stream:
        assert firsts(stream, 8) == list(range(0, 40, 5))


@pytest.mark.parametrize(
    ("deed", "words"),
    [(die, "was killed by SIGKILL"), (segfault, "was killed by SIGSEGV"), (leave, "ended with exit code 3")],
)
def test_a_dead_worker_is_reported_with_its_sample_and_its_batch_is_made_again(deed, words, tmp_path, caplog):
    with open_stream(Rows(deeds={12: deed}, marks=tmp_path)) as stream:
        assert firsts(stream, 40) == list(range(0, 200, 5))
    assert words in caplog.text
    assert "while on sample 12, in the batch of positions 10 to 14 of epoch 0" in caplog.text


def test_a_sample_that_kills_two_workers_ends_the_run_with_a_sentence():
    sentence = "It is the second worker that sample 12 ended"
    with open_stream(Rows(deeds={12: die})) as stream, pytest.raises(DataError, match=sentence):
        firsts(stream, 10)


def test_a_sample_that_kills_two_workers_is_skipped_and_counted_where_samples_may_be():
    told = []
    with open_stream(Rows(deeds={12: die}), bad="skip", on_skip=lambda n, example: told.append(example)) as stream:
        batches = [next(stream) for _ in range(6)]
    assert batches[2]["weight"].tolist() == [1, 1, 0, 1, 1]
    assert [int(b["i"][0]) for b in batches] == [0, 5, 10, 15, 20, 25]
    assert told == ["sample 12: DataError: it killed two worker processes"]


def test_workers_that_keep_dying_exceed_their_budget(tmp_path):
    source = Rows(deeds=dict.fromkeys(range(0, 200, 5), die), marks=tmp_path)  # each sample kills but one
    sentence = "3 lost workers within 1000 batches, more than restarts=2"
    with open_stream(source, restarts=2) as stream, pytest.raises(DataError, match=sentence):
        firsts(stream, 10)


def test_a_silent_worker_is_replaced_at_its_deadline(tmp_path, caplog):
    with open_stream(Rows(deeds={12: hang}, marks=tmp_path), timeout=timedelta(seconds=0.7)) as stream:
        assert firsts(stream, 10) == list(range(0, 50, 5))
    assert "said nothing for 0.7 s while on sample 12" in caplog.text


def test_a_slow_batch_of_lively_samples_is_not_silent():
    slow = {i: lambda: time.sleep(0.15) for i in range(200)}
    with open_stream(Rows(deeds=slow), timeout=timedelta(seconds=0.5)) as stream:
        assert firsts(stream, 3) == [0, 5, 10]  # 0.75 s each


def test_an_idle_worker_that_was_killed_is_replaced(caplog):
    with open_stream(Rows(), prefetch=1) as stream:
        next(stream)
        wait_until(lambda: all(psutil.Process(pid).status() == "sleeping" for pid in stream.worker_pids))
        for pid in stream.worker_pids:
            os.kill(pid, signal.SIGKILL)
        assert firsts(stream, 8) == list(range(5, 45, 5))
    assert "between two batches" in caplog.text


def test_arrays_stay_whole_as_long_as_they_are_held():
    """Buffers are written again only when nothing of the batch in them is left."""
    with open_stream(Rows(), prefetch=2) as stream:
        held = [next(stream) for _ in range(30)]
        views = [batch["x"][0][10:20] for batch in held]
        del held
        gc.collect()
        [next(stream) for _ in range(30)]
        assert [view[0] for view in views] == list(range(0, 150, 5))


def test_batches_that_are_not_held_use_a_bounded_number_of_buffers():
    with open_stream(Rows(2000), prefetch=2) as stream:
        held = [next(stream) for _ in range(60)]
        del held
        for _ in range(200):
            next(stream)
        buffers = [len(worker.receiver._buffers) for worker in stream._pool._workers]
    assert max(buffers) <= 8 + 4


def test_batches_of_growing_size_fit():
    class Growing(Rows):
        def __getitem__(self, index):
            return {"x": np.full(1000 * (index // 4 + 1), index, np.float64)}

    with LocalBatches(Growing(80), size=4, shuffle=False, workers=1, collate="numpy") as stream:
        assert [next(stream)["x"].shape for _ in range(20)] == [(4, 1000 * (n + 1)) for n in range(20)]


def test_tensors_of_any_dtype_come_through_a_worker():
    torch = pytest.importorskip("torch")
    samples = [
        {"f": torch.full((2, 9000), i, dtype=torch.bfloat16), "b": torch.tensor(i > 3), "c": torch.tensor(1j * i)}
        for i in range(8)
    ]
    with LocalBatches(samples, size=4, shuffle=False, workers=1) as stream:
        batch = [next(stream), next(stream)][1]
    assert batch["f"].dtype == torch.bfloat16 and batch["f"].shape == (4, 2, 9000)
    assert torch.equal(batch["f"][:, 1, 5].float(), torch.tensor([4.0, 5, 6, 7]))
    assert batch["b"].dtype == torch.bool and batch["c"].tolist() == [4j, 5j, 6j, 7j]


def test_closing_leaves_no_process_and_no_descriptor():
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        stream = open_stream(Rows())
        next(stream)
        pids = stream.worker_pids
        stream.close()
        assert not alive(pids)
    del stream
    gc.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


def test_a_forgotten_stream_ends_its_workers():
    stream = open_stream(Rows())
    next(stream)
    pids = stream.worker_pids
    del stream
    gc.collect()
    wait_until(lambda: not alive(pids))


SCRIPT = """
    import sys, time, signal
    import numpy as np
    from trainfleet.data import LocalBatches
    class Slow:
        def __len__(self):
            return 50
        def __getitem__(self, index):
            if index >= 5:
                time.sleep(600)  # busy when the parent ends, not listening to it
            return np.ones(9000)
    if __name__ == "__main__":
        stream = LocalBatches(Slow(), size=5, shuffle=False, workers=2, start_method=sys.argv[2])
        next(stream)
        print(*stream.worker_pids, flush=True)
        if sys.argv[1] == "wait":
            time.sleep(60)
"""


@pytest.mark.parametrize("start_method", ["fork", "forkserver"])
def test_workers_die_with_a_parent_that_was_killed(tmp_path, start_method):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    with subprocess.Popen([sys.executable, script, "wait", start_method], stdout=subprocess.PIPE, text=True) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(alive(pids)) == 2
        parent.kill()
    wait_until(lambda: not alive(pids))


@pytest.mark.parametrize("start_method", ["fork", "forkserver"])
def test_a_program_that_closes_nothing_ends_quietly_and_takes_its_workers_along(tmp_path, start_method):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    done = subprocess.run(
        [sys.executable, "-W", "default", script, "end", start_method], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and done.stderr == ""
    assert not alive([int(pid) for pid in done.stdout.split()])


def test_workers_started_from_another_thread_outlive_that_thread():
    stream = open_stream(Rows())
    thread = threading.Thread(target=next, args=(stream,))
    thread.start()
    thread.join()
    pids = stream.worker_pids
    time.sleep(0.1)
    assert alive(pids) == pids
    assert firsts(stream, 2) == [5, 10]
    stream.close()


def test_ctrl_c_and_sigterm_are_the_business_of_the_parent():
    with open_stream(Rows()) as stream:
        next(stream)
        pids = stream.worker_pids
        for pid in pids:
            os.kill(pid, signal.SIGINT)
            os.kill(pid, signal.SIGTERM)
        assert firsts(stream, 10) == list(range(5, 55, 5))
        assert stream.worker_pids == pids


def test_workers_let_go_of_the_sockets_of_their_parent():
    """Else a port stays taken, and peers wait, until the last worker of a dead rank is gone."""
    with socket.create_server(("127.0.0.1", 0)) as server, open_stream(Rows()) as stream:
        next(stream)
        port = server.getsockname()[1]
        server.close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=2)


def test_what_cannot_be_pickled_is_refused_with_a_sentence_where_it_must_be():
    stream = open_stream(Rows(), transform=lambda sample: sample, start_method="forkserver")
    with pytest.raises(DataError, match=r"cannot be sent to worker processes.*top level of a module"):
        next(stream)
    assert stream.worker_pids == []
    with open_stream(Rows(), transform=lambda sample: sample) as forked:
        assert firsts(forked, 2) == [0, 5]


def test_a_batch_that_cannot_be_sent_is_a_sentence():
    stream = LocalBatches([1, 2], size=2, collate=lambda samples: (x for x in samples), workers=1)
    with stream, pytest.raises(DataError, match="cannot be sent from its worker process"):
        next(stream)


def test_torch_in_a_worker_keeps_to_one_thread():
    torch = pytest.importorskip("torch")

    def multiply(sample):
        torch.ones(400, 400) @ torch.ones(400, 400)  # hangs after a fork if it asks for its pool
        return {"threads": torch.get_num_threads(), **sample}

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.ones(800, 800) @ torch.ones(800, 800)
        with open_stream(Rows(), transform=multiply) as stream:
            assert next(stream)["threads"].tolist() == [1] * 5
    finally:
        torch.set_num_threads(threads)
