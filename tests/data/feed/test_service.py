"""A data service listens or calls, feeds many at a time, and leaves nothing behind."""

from __future__ import annotations

import threading
from datetime import timedelta

import psutil
import pytest
from data.feed.made import Numbers, local, same

from trainfleet.data.feed import DataService, RemoteBatches
from trainfleet.errors import ConfigError, NotAdmitted
from trainfleet.net.credentials import Credentials
from trainfleet.net.dial import dial
from trainfleet.net.listener import Listener
from trainfleet.net.probe import Probe

FREE = "127.0.0.1:0"


@pytest.fixture(autouse=True)
def nothing_stays():
    threads, children = set(threading.enumerate()), set(psutil.Process().children())
    yield
    assert not [thread for thread in threading.enumerate() if thread not in threads and "trainfleet" in thread.name]
    assert set(psutil.Process().children()) <= children


def test_it_feeds_several_runs_each_at_its_own_place():
    with DataService(local(workers=1), address=FREE).open() as service:
        address = str(service.address)
        with RemoteBatches(address, as_numpy=True) as one, RemoteBatches(address, size=5, as_numpy=True) as other:
            plain, fives = local(), local(size=5)
            for _ in range(20):
                assert same(next(one), next(plain)) and same(next(other), next(fives))
            assert len(service.trainers) == 2


def test_two_ranks_together_get_the_whole():
    with DataService(local(size=4), address=FREE).open() as service:
        ranks = [RemoteBatches(str(service.address), rank=r, world_size=2, as_numpy=True) for r in range(2)]
        seen = [int(i) for _ in range(12) for rank in ranks for i in next(rank)["i"]]
        plain = local(size=8)
        assert seen == [int(i) for _ in range(12) for i in next(plain)["i"]]
        for rank in ranks:
            rank.close()


def test_it_offers_an_evaluation_that_ends_and_begins_again():
    evaluation = local(Numbers(20), shuffle=False, short="keep")
    with (
        DataService(local(), evaluation=evaluation, address=FREE).open() as service,
        RemoteBatches(str(service.address), stream="evaluation", as_numpy=True) as batches,
    ):
        for _ in range(2):
            assert [int(i) for batch in batches for i in batch["i"]] == list(range(20))
            batches.rewind()


def test_it_may_call_a_trainer_that_listens():
    with Listener(FREE, role="free") as free:
        address = str(free.address)
    with DataService(local(), address=None, dials=[address]).open():
        with RemoteBatches(listen=address, as_numpy=True) as batches:
            plain = local()
            for _ in range(5):
                assert same(next(batches), next(plain))
        with RemoteBatches(listen=address, as_numpy=True) as batches:  # it calls again
            assert same(next(batches), next(local()))


def test_a_token_is_all_that_a_trainer_needs_off_loopback():
    credentials = Credentials.make()
    with DataService(local(), address=FREE, credentials=credentials).open() as service:
        token = service.token()
        with RemoteBatches(str(token), as_numpy=True) as batches:
            assert same(next(batches), next(local()))
        with pytest.raises(NotAdmitted):
            RemoteBatches(str(Credentials.make().token([service.address])), timeout=timedelta(seconds=5))


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="needs an address"):
        DataService(local(), address=None)
    with pytest.raises(ConfigError, match="credentials"):
        DataService(local(), address="0.0.0.0:0").open()
    with Listener(FREE, role="other") as other, pytest.raises(ConfigError, match=str(other.address.port)):
        DataService(local(workers=1), address=str(other.address)).open()
    with pytest.raises(ConfigError, match="does not listen"):
        DataService(local()).address  # noqa: B018


def test_closing_twice_is_closing():
    service = DataService(local(workers=1), address=FREE).open()
    service.close()
    service.close()


def test_a_doctor_is_answered_and_sent_away_at_the_end():
    service = DataService(local(), address=FREE)
    with service.open(), dial(service.address, role="doctor", timeout=timedelta(seconds=5)) as sock:
        assert Probe(sock, str(service.address)).round_trips(count=3).median < 1
        service.close()
        assert sock.recv(1) == b""
