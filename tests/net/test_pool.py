"""Work goes to whichever peer is free, comes back where one is gone or late, and is let go of where nobody wants it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest

from trainfleet.errors import PeerError
from trainfleet.net import lease
from trainfleet.net.peers import Ways
from trainfleet.net.pool import Pool


class Known:
    """A peer that notes what is asked of it."""

    is_alive = True

    def __init__(self, name: str) -> None:
        self.name = name
        self.asked: list[Any] = []

    def ask(self, task: int, unit: str, /) -> None:
        self.asked.append((task, unit))

    def forget(self) -> None:
        self.asked.append("forget")

    def say_bye(self) -> None:
        self.asked.append("bye")

    def close(self) -> None: ...

    def join(self, seconds: float) -> None: ...


@pytest.fixture
def pool() -> Iterator[Pool[str, str]]:
    def never(name: str, connect: Any, again: bool) -> Known:
        raise AssertionError("nobody is called")

    ways, wait = Ways(), timedelta(seconds=1)
    with_peers = Pool[str, str](ways, never, role="r", admits="a", called="Peer", timeout=wait, remedy="Start one.")
    yield with_peers
    with_peers.close()


def joined(pool: Pool[str, str], *names: str, room: int = 4) -> list[Known]:
    members = [Known(name) for name in names]
    for member in members:
        pool._peers._members.append(member)
        pool._leases.join(member, room=room)
        pool._peers.joined(member.name)
    return members


def test_what_is_submitted_goes_to_whoever_is_free_and_comes_out_once(pool: Pool[str, str]) -> None:
    one, other = joined(pool, "one", "other", room=1)
    pool.submit(0, "a")
    pool.submit(1, "b")
    pool.submit(2, "c")
    assert one.asked == [(0, "a")] and other.asked == [(1, "b")] and pool.connected == 2
    pool.take_in(other, 1, "B", 10, idle=False)
    assert other.asked == [(1, "b"), (2, "c")], "it has room again"
    assert pool.has(1) and pool.take(1, "b") == "B" and not pool.has(1)
    pool.take_in(one, 1, "B again", 10, idle=False)
    assert not pool.has(1), "the first answer counted"


def test_what_a_peer_had_is_asked_of_others(pool: Pool[str, str], caplog: pytest.LogCaptureFixture) -> None:
    one, other = joined(pool, "one", "other", room=2)
    for task in range(4):
        pool.submit(task, str(task))
    for task, _ in list(one.asked):
        pool.take_in(one, task, "found", 10, idle=False)
    pool.left(other, PeerError("It was killed."))
    assert sorted(one.asked[2:]) == sorted(other.asked) and (pool.repeated, pool.lost, pool.connected) == (2, 1, 1)
    assert "Peer other is gone: It was killed. 2 batches are asked of others." in caplog.text
    with caplog.at_level(logging.ERROR):
        pool.given_up(one, PeerError("It has other data."))
    assert "Peer one is given up: It has other data." in caplog.text and pool.connected == 0 and pool.repeated == 4


def test_one_that_was_never_here_is_not_said_to_be_gone(pool: Pool[str, str], caplog: pytest.LogCaptureFixture) -> None:
    pool.left(Known("stranger"), PeerError("It said nothing."))
    assert "is gone" not in caplog.text and pool.lost == 1


def test_what_is_late_is_asked_of_another_too(pool: Pool[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "LATE_SECONDS", 0.05)
    one, other = joined(pool, "one", "other", room=1)
    pool.submit(0, "a")
    assert (one.asked, other.asked) == ([(0, "a")], [])
    with pytest.raises(PeerError, match=r"Waited 1 s for a batch, and the 2 that are here made no progress.*"):
        pool.take(0, "a batch")
    assert other.asked == [(0, "a")] and pool.repeated == 1 and pool.seconds_waited >= 1
    pool.take_in(other, 0, "A", 10, idle=False)
    assert pool.take(0, "a batch") == "A"


def test_peers_are_told_what_is_dropped_where_nothing_else_is_wanted(pool: Pool[str, str]) -> None:
    (one,) = joined(pool, "one")
    for task in range(3):
        pool.submit(task, str(task))
    pool.drop([0, 1])
    assert "forget" not in one.asked
    pool.take_in(one, 0, "found", 10, idle=False)
    assert not pool.has(0)
    pool.drop([2])
    assert one.asked[-1] == "forget"


def test_nobody_there_is_an_error_with_the_remedy(pool: Pool[str, str]) -> None:
    pool.submit(0, "a")
    with pytest.raises(PeerError, match="Waited 1 s for a batch, and no a was there") as caught:
        pool.take(0, "a batch")
    assert caught.value.hint == "Start one."
