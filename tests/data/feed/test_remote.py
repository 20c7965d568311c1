"""A fed stream is the local one, whatever happens to the feeders."""

from __future__ import annotations

import dataclasses
import time
from collections import namedtuple
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import pytest
from data.feed.made import Numbers, local, same

from trainfleet.batch import BatchStream
from trainfleet.data.feed import DataService, RemoteBatches
from trainfleet.errors import ConfigError, DataError, PeerError
from trainfleet.net.listener import Listener

FREE = "127.0.0.1:0"
SOON = timedelta(seconds=3)


@pytest.fixture
def serve():
    services = []

    def start(stream=None, address=FREE, **settings):
        services.append(DataService(stream or local(), address=address, **settings).open())
        return services[-1]

    yield start
    for service in services:
        service.close()


def numpy_stream(*services, **settings):
    return RemoteBatches([str(service.address) for service in services], as_numpy=True, **settings)


def test_it_goes_on_where_a_local_stream_was_saved_and_the_reverse(serve):
    plain = local()
    for _ in range(15):
        next(plain)
    with numpy_stream(serve()) as fed:
        assert isinstance(fed, BatchStream)
        fed.load_state_dict(plain.state_dict())
        for _ in range(15):
            assert same(next(fed), next(plain))
        assert fed.state_dict() == plain.state_dict()
        again = local()
        again.load_state_dict(fed.state_dict())
        assert same(next(again), next(fed))


def test_a_saved_seed_goes_on(serve):
    other = local(seed=11)
    next(other)
    with numpy_stream(serve()) as fed:
        next(fed)
        fed.load_state_dict(other.state_dict())
        assert same(next(fed), next(other)) and same(next(fed), next(other))


def test_feeders_may_come_and_go(serve):
    first = serve()
    address = str(first.address)
    with Listener(FREE, role="free") as free:
        later = str(free.address)
    plain = local()
    with RemoteBatches([address, later], as_numpy=True) as fed:
        for _ in range(10):
            assert same(next(fed), next(plain))
        serve(address=later)
        deadline = time.monotonic() + 20
        while fed.feeders.connected < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        first.close()
        for _ in range(20):
            assert same(next(fed), next(plain))
        assert fed.feeders.lost == 1
        serve(address=address)
        for _ in range(20):
            assert same(next(fed), next(plain))
        assert fed.state_dict() == plain.state_dict()


def test_a_slow_feeder_does_not_hold_up_the_loop(serve):
    class Slow(Numbers):
        def __getitem__(self, index):
            time.sleep(0.05)
            return super().__getitem__(index)

    Slow.__qualname__ = Numbers.__qualname__  # to the trainer they are alike
    slow, quick = serve(local(Slow())), serve(local())
    plain = local()
    with numpy_stream(slow, quick) as fed:
        begun = time.monotonic()
        for _ in range(60):
            assert same(next(fed), next(plain))
        assert time.monotonic() - begun < 12, "0.4 s a batch at the slow one"


def test_a_bad_sample_is_that_of_a_local_stream(serve):
    service = serve(local(Numbers(bad=[41])))
    plain, skipped = local(Numbers(bad=[41]), bad="skip"), []
    with numpy_stream(service, bad="skip", on_skip=lambda count, example: skipped.append(example)) as fed:
        for _ in range(12):
            assert same(next(fed), next(plain))
        assert fed.skipped == plain.skipped == 1 and "41 is rotten" in skipped[0]
    with numpy_stream(service) as fed, pytest.raises(DataError, match="41 is rotten"):
        for _ in range(13):
            next(fed)


@dataclass
class Pair:
    i: int
    x: np.ndarray


Point = namedtuple("Point", "i x")


def as_pair(sample):
    return Pair(sample["i"], sample["x"])


def test_only_classes_that_are_expected_are_built(serve):
    service = serve(local(transform=as_pair))
    with numpy_stream(service, classes=[Pair]) as fed:
        batch = next(fed)
        assert isinstance(batch, Pair) and dataclasses.asdict(batch)["x"].shape == (8, 50)
    with numpy_stream(service) as fed, pytest.raises(DataError, match="Pair"):
        next(fed)


def test_tensors_come_as_tensors(serve):
    torch = pytest.importorskip("torch")
    service = serve()
    with RemoteBatches(str(service.address)) as fed:
        batch = next(fed)
        assert isinstance(batch["noise"], torch.Tensor) and batch["noise"].dtype == torch.float32


def test_other_data_on_one_feeder_is_refused_and_said(serve):
    one, other = serve(), serve(local(Numbers(shift=1)))
    plain = local()
    with numpy_stream(one) as fed:
        next(fed)
    with numpy_stream(one, other) as fed:
        mine = fed.state_dict()
        assert mine["samples"] == 100
        time.sleep(0.3)
        assert fed.feeders.connected == 1
        first, shifted = next(fed), local(Numbers(shift=1))
        assert same(first, next(plain)) or same(first, next(shifted))


def test_no_feeder_at_all_is_said_at_the_deadline():
    with Listener(FREE, role="free") as free:
        address = str(free.address)
    begun = time.monotonic()
    with pytest.raises(PeerError, match="no feeder was there"):
        RemoteBatches(address, timeout=timedelta(seconds=1))
    assert time.monotonic() - begun < 5


def test_feeders_that_stay_away_end_the_wait(serve):
    service = serve()
    with numpy_stream(service, timeout=timedelta(seconds=1)) as fed:
        next(fed)
        service.close()
        with pytest.raises(PeerError, match="no feeder was there"):
            for _ in range(1000):
                next(fed)


@pytest.mark.parametrize("wrong", [{}, {"feeders": "127.0.0.1:1", "buffer_bytes": 0}, {"feeders": "a:b:c"}])
def test_what_cannot_be_is_refused(wrong):
    with pytest.raises(ConfigError):
        RemoteBatches(**wrong, timeout=SOON)


def test_a_stream_that_feeders_do_not_have_is_said(serve):
    with pytest.raises(DataError, match="no stream 'evaluation'"):
        numpy_stream(serve(), stream="evaluation")


def test_no_more_waits_here_than_the_buffer_allows(serve):
    service = serve(local(Numbers(4000)))
    with numpy_stream(service, buffer_bytes=20_000) as fed:
        size = sum(array.nbytes for array in next(fed).values())
        for _ in range(20):
            next(fed)
            assert fed.feeders.depth * size <= 20_000 + 2 * size
