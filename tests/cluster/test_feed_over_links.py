"""Over links that are cut, half-open, halted or lie a stream is the local one: each sample once an epoch."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta

import pytest
from data.feed.made import local, same

from trainfleet.data.feed import DataService, RemoteBatches, session
from trainfleet.net import line
from trainfleet.net.address import Address
from trainfleet.net.credentials import Credentials
from trainfleet.net.link import Link

pytestmark = pytest.mark.cluster

BATCHES_AN_EPOCH = 12  # of 8 out of 100 samples, the short last one left out


@pytest.fixture(autouse=True)
def soon_noticed(monkeypatch) -> None:
    """Silence counts as an end after 1 s instead of 10."""
    for module in (line, session):
        monkeypatch.setattr(module, "ALIVE_SECONDS", 0.2)
        monkeypatch.setattr(module, "SILENCE_SECONDS", 1.0)


class Fed:
    """A stream from `feeders` services, each behind a link of its own."""

    def __init__(self, *, feeders: int = 1, credentials: Credentials | None = None, **conditions) -> None:
        self._opened = ExitStack()
        self.links: list[Link] = []
        places: list[object] = []
        for number in range(feeders):
            service = self._opened.enter_context(
                DataService(local(), address="127.0.0.1:0", credentials=credentials).open()
            )
            assert service.address is not None
            link = Link(service.address, seed=number, **conditions)
            self._opened.callback(link.close)
            self.links.append(link)
            place = Address(*link.address)
            places.append(place if credentials is None else replace(credentials.token([place])))
        settings = {"as_numpy": True, "timeout": timedelta(seconds=30)}
        self.batches = self._opened.enter_context(RemoteBatches(places, **settings))  # type: ignore[arg-type]

    def __enter__(self) -> Fed:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()


def compared(fed: Fed, epochs: int) -> Iterator[int]:
    """The number of each batch, once it was found to be the local one; at the end, each sample as often as any."""
    plain, seen = local(), Counter()
    for number in range(epochs * BATCHES_AN_EPOCH):
        yield number
        got, expected = next(fed.batches), next(plain)
        assert same(got, expected), f"batch {number}"
        seen.update(got["i"].tolist())
    assert fed.batches.state_dict() == plain.state_dict()
    assert max(seen.values()) <= epochs and sum(seen.values()) == epochs * BATCHES_AN_EPOCH * 8


def test_cuts_in_the_middle_of_an_epoch_lose_and_repeat_nothing():
    with Fed(delay="1ms") as fed:
        for number in compared(fed, 5):
            if number % 13 == 5:
                fed.links[0].cut(0.02)
        assert fed.batches.feeders.lost >= 3
        assert fed.links[0].counters.reset >= 3


def test_a_half_open_link_is_noticed_by_its_silence():
    with Fed(delay="1ms") as fed:
        begun = time.monotonic()
        for number in compared(fed, 3):
            if number == 17:
                fed.links[0].half_open(0.5)
        assert time.monotonic() - begun < 15
        assert fed.batches.feeders.lost == 1 and fed.batches.feeders.repeated >= 1
        assert fed.links[0].counters.swallowed_bytes > 0


def test_a_pause_shorter_than_the_patience_loses_no_feeder():
    with Fed(delay="1ms") as fed:
        for number in compared(fed, 2):
            if number == 7:
                fed.links[0].pause(0.4)
        assert fed.batches.feeders.lost == 0


def test_flipped_bits_are_found_and_what_they_hit_is_asked_for_again():
    with Fed(corruption=2e-5) as fed:
        for _ in compared(fed, 15):
            pass
        flips = fed.links[0].counters.flipped_bits
        assert flips >= 1 and 1 <= fed.batches.feeders.lost <= flips


def test_under_tls_flipped_bits_end_a_connection_and_not_the_run():
    pytest.importorskip("cryptography", reason="identities need the extra `net`")
    with Fed(credentials=Credentials.make(), corruption=2e-5) as fed:
        for _ in compared(fed, 15):
            pass
        assert fed.links[0].counters.flipped_bits >= 1 and fed.batches.feeders.lost >= 1


def test_while_one_link_is_dead_the_other_feeder_makes_all():
    with Fed(feeders=2) as fed:
        begun = time.monotonic()
        for number in compared(fed, 4):
            if number == 10:
                fed.links[0].half_open()
        assert time.monotonic() - begun < 20


@pytest.mark.matrix
@pytest.mark.parametrize("seed", range(10))
def test_forty_faults_in_a_row_lose_and_repeat_nothing(seed):
    """Of all kinds, at any batch, on either of two links, which are far and lossy too."""
    draw = random.Random(seed)
    with Fed(feeders=2, delay="3ms", jitter="3ms", loss=1e-3, rate="200mbit") as fed:
        faults = 0
        for _ in compared(fed, 80):
            if draw.random() < 40 / (80 * BATCHES_AN_EPOCH):
                link = draw.choice(fed.links)
                kind = draw.choice(
                    [link.cut, link.half_open, link.pause, lambda s, link=link: link.cut(s, gently=True)]
                )
                kind(draw.uniform(0.01, 0.6))
                faults += 1
        assert faults > 20
