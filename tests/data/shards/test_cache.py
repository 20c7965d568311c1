"""The cache stays within its bound, whoever reads and whoever dies; a shard has its name only when it is whole."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import signal
import threading
import time

import pytest
from data.shards.made import used, watched

from trainfleet.data.shards.cache import PART, Damaged, Part, ShardCache
from trainfleet.errors import DataError

FORK = multiprocessing.get_context("fork")


def content(name, size=1000):
    return name.encode().ljust(size, b".")


def writer(name, size=1000, pieces=1, seconds=0.0, count=None):
    """Fetches `content(name)`, in pieces; `count` is a file that gets a byte for each time."""

    def fetch(part: Part) -> None:
        if count is not None:
            with count.open("ab") as file:
                file.write(b".")
        data = content(name, size)
        for piece in range(pieces):
            part.write(data[piece * size // pieces : (piece + 1) * size // pieces])
            time.sleep(seconds)

    return fetch


def read(cache, name, size=1000, num_bytes=None, **how):
    descriptor = cache.open(name, writer(name, size, **how), num_bytes=num_bytes)
    with os.fdopen(descriptor, "rb") as file:
        return file.read()


def test_a_shard_is_fetched_once_and_those_unused_for_longest_go(tmp_path):
    cache, count = ShardCache(tmp_path / "c", 3000), tmp_path / "count"
    for name in ("a", "b", "c"):
        assert read(cache, name, count=count) == content(name)
        time.sleep(0.01)
    cache._used.clear()
    assert read(cache, "a", count=count) == content("a") and count.stat().st_size == 3
    time.sleep(0.01)
    assert read(cache, "d", count=count) == content("d")
    assert cache.holds("a") and not cache.holds("b") and cache.holds("c") and cache.holds("d")


def test_a_shard_that_is_removed_while_it_is_read_stays_readable(tmp_path):
    cache = ShardCache(tmp_path, 1000)
    descriptor = cache.open("a", writer("a"))
    assert read(cache, "b") == content("b") and not cache.holds("a")
    with os.fdopen(descriptor, "rb") as file:
        assert file.read() == content("a")


def test_another_size_than_known_is_fetched_anew_and_then_named(tmp_path):
    cache = ShardCache(tmp_path, 5000)
    read(cache, "a", size=900)
    assert read(cache, "a", size=1000, num_bytes=1000) == content("a")
    with pytest.raises(Damaged, match="came with 900 bytes, and should have 1000"):
        read(cache, "b", size=900, num_bytes=1000)
    assert not list(tmp_path.glob(f"*{PART}")) and not cache.holds("b")


def test_a_fetch_that_fails_leaves_nothing_and_can_be_tried_again(tmp_path):
    cache = ShardCache(tmp_path, 5000)

    def fails(part):
        part.write(b"half")
        raise DataError("no more")

    with pytest.raises(DataError, match="no more"):
        cache.open("a", fails)
    assert used(tmp_path) == 0 and read(cache, "a") == content("a")


def test_a_shard_larger_than_the_cache_is_refused_with_both_sizes(tmp_path):
    with pytest.raises(DataError, match=r"1000 bytes or more, and the cache .* may hold 900"):
        read(ShardCache(tmp_path, 900), "a", num_bytes=1000)
    with pytest.raises(DataError, match=r"bytes or more, and the cache .* may hold 900"):
        read(ShardCache(tmp_path, 900), "a")


def _read_all(folder, seed, rounds):
    cache = ShardCache(folder, 5000)
    for i in range(rounds):
        name, size = f"s{(i * 7 + seed * 3) % 11}", 700 + 100 * ((i * 7 + seed * 3) % 11 % 4)
        known = size if (i + seed) % 2 else None
        assert read(cache, name, size=size, pieces=3, num_bytes=known) == content(name, size)


@pytest.mark.parametrize("processes", [3])
def test_the_bound_holds_while_processes_fetch_at_once_known_sizes_and_unknown(tmp_path, processes):
    readers = [FORK.Process(target=_read_all, args=(tmp_path, seed, 60)) for seed in range(processes)]
    with watched(tmp_path) as most:
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(60)
    assert [reader.exitcode for reader in readers] == [0] * processes
    assert 2500 < most[0] <= 5000
    assert not list(tmp_path.glob(f"*{PART}"))


def test_one_fetches_and_the_others_wait_for_it(tmp_path):
    cache, count = ShardCache(tmp_path / "c", 5000), tmp_path / "count"
    told = []
    cache.still_there = lambda: told.append(1)
    other = FORK.Process(target=read, args=(cache, "a"), kwargs={"pieces": 10, "seconds": 0.03, "count": count})
    other.start()
    part = tmp_path / "c" / f"a{PART}"
    while not part.exists() or part.stat().st_size == 0:  # it has the lock
        time.sleep(0.005)
    assert read(cache, "a", count=count) == content("a")
    other.join(10)
    assert count.stat().st_size == 1 and len(told) >= 2, "one fetch, and waiting was told as progress"


@pytest.mark.parametrize("known", [True, False])
def test_a_process_killed_while_it_fetches_leaves_no_lock_no_file_and_no_room_taken(tmp_path, known):
    cache = ShardCache(tmp_path, 2000)
    kwargs = {"pieces": 100, "seconds": 0.05, "num_bytes": 1000 if known else None}
    victim = FORK.Process(target=read, args=(cache, "a"), kwargs=kwargs)
    victim.start()
    part = tmp_path / f"a{PART}"
    while not part.exists() or part.stat().st_size == 0:
        time.sleep(0.005)
    time.sleep(0.1)
    os.kill(victim.pid, signal.SIGKILL)
    victim.join(10)
    assert part.exists() and not cache.holds("a")
    # The room that it had reserved is given to others, and its shard to whoever wants it.
    assert read(cache, "b", size=2000, num_bytes=2000) == content("b", 2000)
    assert not part.exists()
    assert read(cache, "a") == content("a")


def test_a_process_that_hangs_while_it_fetches_is_named_after_the_deadline(tmp_path):
    cache = ShardCache(tmp_path, 5000, timeout=0.4)
    victim = FORK.Process(target=read, args=(cache, "a"), kwargs={"pieces": 100, "seconds": 0.02})
    victim.start()
    try:
        part = tmp_path / f"a{PART}"
        while not part.exists() or part.stat().st_size == 0:  # it has the lock
            time.sleep(0.005)
        os.kill(victim.pid, signal.SIGSTOP)
        with pytest.raises(DataError, match=r"another process, without a byte in 0.4 s"):
            read(cache, "a")
    finally:
        victim.kill()
        victim.join(10)


def test_a_full_disk_is_a_sentence_and_first_costs_older_shards(tmp_path, monkeypatch):
    cache = ShardCache(tmp_path, 5000)
    read(cache, "a", num_bytes=1000)
    reserve = os.posix_fallocate

    def full(descriptor, begin, size):
        if used(tmp_path) + size > 1500:
            raise OSError(errno.ENOSPC, "No space left on device")
        reserve(descriptor, begin, size)

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert read(cache, "b", num_bytes=1000) == content("b") and not cache.holds("a")
    with pytest.raises(DataError, match=r"disk of the cache .* is full.*may hold 5000 bytes"):
        read(cache, "c", size=1600, num_bytes=1600)
    assert used(tmp_path) <= 1000, "nothing half is left"


def test_reading_ahead_never_takes_the_room_of_what_is_in_use(tmp_path):
    cache = ShardCache(tmp_path, 2000)
    read(cache, "a"), read(cache, "b")
    assert not cache.fetch_ahead("c", writer("c"), num_bytes=1000, keep={"a", "b", "c"})
    assert cache.holds("a") and cache.holds("b") and used(tmp_path) == 2000
    assert cache.fetch_ahead("c", writer("c"), num_bytes=1000, keep={"b", "c"})
    assert not cache.holds("a") and cache.holds("c")


def test_a_folder_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cache of shards .*file/c cannot be used"):
        ShardCache(tmp_path / "file" / "c", 100)
    with pytest.raises(DataError, match="cache_bytes is 0"):
        ShardCache(tmp_path, 0)


def test_it_can_be_sent_to_another_process(tmp_path):
    cache = ShardCache(tmp_path, 5000)
    cache.still_there = lambda: None
    assert read(pickle.loads(pickle.dumps(cache)), "a") == content("a")


def test_two_that_hold_room_and_want_more_do_not_wait_for_each_other(tmp_path):
    half, found, errors = threading.Barrier(2), {}, []

    def grow(name):
        waits = [True]

        def fetch(part):
            part.write(content(name, 400))
            if waits and waits.pop():
                half.wait(5)
            part.write(b"-" * 300)

        try:
            with os.fdopen(ShardCache(tmp_path, 1000, timeout=3).open(name, fetch), "rb") as file:
                found[name] = file.read()
        except DataError as exc:
            errors.append(exc)

    threads = [threading.Thread(target=grow, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not errors and found == {name: content(name, 400) + b"-" * 300 for name in "ab"}
