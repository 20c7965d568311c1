"""Over links that are cut, half-open, halted or lie the answers are those of the model here, in order, once each."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import timedelta

import pytest
from left_behind import nothing_left_behind
from serve.made import VALIDATE, Weighted, batches, local, same

from trainfleet.net import line
from trainfleet.net.address import Address
from trainfleet.net.credentials import Credentials
from trainfleet.net.link import Link
from trainfleet.serve import ModelService, RemoteModel, session

pytestmark = pytest.mark.cluster


@pytest.fixture(autouse=True)
def soon_noticed(monkeypatch) -> Iterator[None]:
    """Silence counts as an end after 1 s instead of 10, and nothing is left behind."""
    for module in (line, session):
        monkeypatch.setattr(module, "ALIVE_SECONDS", 0.2)
        monkeypatch.setattr(module, "SILENCE_SECONDS", 1.0)
    with nothing_left_behind():
        yield


class Served:
    """A model on `services` services, each behind a link of its own."""

    def __init__(self, *, services: int = 1, credentials: Credentials | None = None, **conditions) -> None:
        self._opened = ExitStack()
        self.links: list[Link] = []
        self.services: list[ModelService] = []
        places: list[object] = []
        for number in range(services):
            service = ModelService(Weighted(seconds=0.002), address="127.0.0.1:0", credentials=credentials)
            self.services.append(self._opened.enter_context(service.open()))
            link = Link(service.address, seed=number, **conditions)
            self._opened.callback(link.close)
            self.links.append(link)
            place = Address(*link.address)
            places.append(place if credentials is None else credentials.token([place]))
        self.model = self._opened.enter_context(RemoteModel(places, timeout=timedelta(seconds=30)))  # type: ignore[arg-type]

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()


def compared(served: Served, count: int) -> Iterator[int]:
    """The number of each batch, before its answer is found to be the local one."""
    answers = served.model.answers(batches(count), VALIDATE)
    for number, expected in enumerate(local(count)):
        yield number
        assert same(next(answers), expected), f"batch {number}"
    assert next(answers, None) is None


def test_cuts_lose_and_repeat_nothing():
    with Served(delay="1ms") as served:
        for number in compared(served, 60):
            if number % 13 == 5:
                served.links[0].cut(0.02)
        assert served.model.services.lost >= 3 and served.links[0].counters.reset >= 3


def test_a_half_open_link_is_noticed_by_its_silence_on_both_sides():
    with Served(delay="1ms") as served:
        begun = time.monotonic()
        for number in compared(served, 60):
            if number == 17:
                served.links[0].half_open(0.5)
        assert time.monotonic() - begun < 15
        assert served.model.services.lost == 1 and served.model.services.repeated >= 1
        assert served.links[0].counters.swallowed_bytes > 0
        deadline = time.monotonic() + 5
        while len(served.services[0].clients) > 1:
            assert time.monotonic() < deadline, "the old connection has to end"
            time.sleep(0.02)


def test_a_pause_shorter_than_the_patience_loses_no_service():
    with Served(delay="1ms") as served:
        for number in compared(served, 40):
            if number == 7:
                served.links[0].pause(0.4)
        assert served.model.services.lost == 0


@pytest.mark.parametrize("tls", [False, True])
def test_flipped_bits_are_found_and_what_they_hit_is_asked_again(tls):
    if tls:
        pytest.importorskip("cryptography", reason="identities need the extra `net`")
    with Served(credentials=Credentials.make() if tls else None, corruption=2e-5) as served:
        for _ in compared(served, 150):
            pass
        assert served.links[0].counters.flipped_bits >= 1 and served.model.services.lost >= 1


def test_while_one_link_is_dead_the_other_service_answers_all():
    with Served(services=2) as served:
        begun = time.monotonic()
        for number in compared(served, 100):
            if number == 10:
                served.links[0].half_open()
        assert time.monotonic() - begun < 15


@pytest.mark.matrix
@pytest.mark.parametrize("seed", range(10))
def test_forty_faults_in_a_row_lose_and_repeat_nothing(seed):
    """Of all kinds, at any batch, on either of two links, which are far and lossy too."""
    draw = random.Random(seed)
    with Served(services=2, delay="3ms", jitter="3ms", loss=1e-3, rate="200mbit") as served:
        faults = 0
        for _ in compared(served, 900):
            if draw.random() < 40 / 900:
                link = draw.choice(served.links)
                kind = draw.choice(
                    [link.cut, link.half_open, link.pause, lambda s, link=link: link.cut(s, gently=True)]
                )
                kind(draw.uniform(0.01, 0.6))
                faults += 1
        assert faults > 20
