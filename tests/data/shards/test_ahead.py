"""What is expected is fetched behind the scenes, as far as there is room."""

from __future__ import annotations

import threading
import time

import pytest
from data.shards.test_cache import writer

from trainfleet.data.shards.ahead import ReadAhead
from trainfleet.data.shards.cache import ShardCache
from trainfleet.errors import DataError


@pytest.fixture
def cache(tmp_path):
    return ShardCache(tmp_path, 3000)


def until(what, seconds=10.0):
    ends = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < ends
        time.sleep(0.005)


def wanted(names, **how):
    return [(name, writer(name, **how), 1000) for name in names], set(names)


def test_what_is_expected_comes_in_order_as_far_as_it_fits(cache):
    ahead = ReadAhead(cache)
    ahead.expect(*wanted("abcde"))
    until(lambda: cache.holds("c"))
    ahead.expect(*wanted("bcde"))
    until(lambda: cache.holds("d"))
    assert not cache.holds("a") and cache.holds("b") and cache.holds("c") and not cache.holds("e")
    ahead.close()


def test_what_another_is_at_is_passed_over(cache):
    ahead, slow, go = ReadAhead(cache), ReadAhead(cache), threading.Event()

    def waits(part):
        go.wait(10)
        writer("a")(part)

    slow.expect([("a", waits, 1000)], {"a"})
    until(lambda: (cache.folder / "a.part").exists())
    ahead.expect(*wanted("ab"))
    until(lambda: cache.holds("b"))
    assert not cache.holds("a")
    go.set()
    until(lambda: cache.holds("a"))
    ahead.close(), slow.close()


def test_what_fails_ahead_is_not_tried_again_and_again(cache):
    tries = []

    def fails(part):
        tries.append(1)
        raise DataError("gone")

    ahead = ReadAhead(cache)
    for keep in ({"a", "b"}, {"a", "b", "x"}, {"a", "b", "y"}):
        ahead.expect([("a", fails, 1000), ("b", writer("b"), 1000)], keep)
        until(lambda: cache.holds("b"))
        cache.remove("b")
    assert len(tries) == 1
    ahead.close()


def test_it_ends_when_closed_and_starts_nothing_before_it_is_asked(cache):
    before = threading.active_count()
    ahead = ReadAhead(cache)
    ahead.expect([], set())
    assert threading.active_count() == before
    ahead.expect(*wanted("a"))
    until(lambda: cache.holds("a"))
    ahead.close()
    until(lambda: threading.active_count() == before)


def test_a_thread_with_nothing_to_do_ends_and_another_begins_when_there_is(cache, monkeypatch):
    monkeypatch.setattr("trainfleet.data.shards.ahead.IDLE_SECONDS", 0.05)
    before, ahead = threading.active_count(), ReadAhead(cache)
    for name in "ab":
        ahead.expect(*wanted(name))
        until(lambda name=name: cache.holds(name))
        until(lambda: threading.active_count() == before)
    ahead.close()
