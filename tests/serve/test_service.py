"""A GPU service answers many clients in turn, counts what it did, and leaves nothing behind."""

from __future__ import annotations

import threading
import time
from datetime import timedelta

import pytest
from left_behind import nothing_left_behind
from serve.made import VALIDATE, Weighted, all_same, batches, local

from trainfleet.errors import ConfigError, PeerError
from trainfleet.net.dial import dial
from trainfleet.net.listener import Listener
from trainfleet.net.probe import Probe
from trainfleet.serve import service as service_module
from trainfleet.serve.remote import RemoteModel
from trainfleet.serve.service import ModelService

FREE = "127.0.0.1:0"


@pytest.fixture(autouse=True)
def nothing_stays():
    with nothing_left_behind():
        yield


def test_it_answers_several_clients_at_a_time_and_counts():
    with ModelService(Weighted(), address=FREE).open() as service:
        results = {}

        def run(number):
            with RemoteModel(str(service.address)) as model:
                results[number] = list(model.answers(batches(30), VALIDATE))

        threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert all(all_same(results[number], local(30)) for number in range(4))
        deadline = time.monotonic() + 5
        while service.served.clients:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        served = service.served
    assert (served.batches, served.rows, served.failed, served.waiting, served.held_bytes) == (120, 960, 0, 0, 0)
    assert served.num_bytes > 120 * 1600 and served.busy_seconds > 0


def test_one_client_does_not_wait_for_anothers_whole_queue():
    with (
        ModelService(Weighted(seconds=0.02), address=FREE).open() as service,
        RemoteModel(str(service.address)) as many,
        RemoteModel(str(service.address)) as few,
    ):
        greedy = many.answers(batches(200), VALIDATE)
        next(greedy)
        begun = time.monotonic()
        assert all_same(few.answers(batches(2), VALIDATE), local(2))
        assert time.monotonic() - begun < 1
        greedy.close()


def test_a_doctor_is_answered():
    with ModelService(Weighted(), address=FREE).open() as service:
        with dial(service.address, role="doctor", timeout=timedelta(seconds=5)) as sock:
            assert Probe(sock, str(service.address)).round_trips(count=3).median < 1
        assert service.clients == []


def test_more_clients_than_it_serves_are_sent_away(monkeypatch):
    monkeypatch.setattr(service_module, "MOST_CLIENTS", 1)
    with ModelService(Weighted(), address=FREE).open() as service, RemoteModel(str(service.address)) as first:
        assert first.digest == "weight-3" and len(service.clients) == 1
        with (
            RemoteModel(str(service.address), timeout=timedelta(seconds=0.5)) as second,
            pytest.raises(PeerError, match="no gpu-service was there"),
        ):
            second.digest  # noqa: B018
        assert all_same(first.answers(batches(), VALIDATE), local())


def test_it_may_be_closed_while_it_answers():
    service = ModelService(Weighted(seconds=0.05), address=FREE).open()
    with RemoteModel(str(service.address), timeout=timedelta(seconds=0.5)) as model:
        answers = model.answers(batches(100), VALIDATE)
        next(answers)
        service.close()
        service.close()
        with pytest.raises(PeerError):
            list(answers)


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="needs an address"):
        ModelService(Weighted(), address=None)
    with pytest.raises(ConfigError, match="window_bytes"):
        ModelService(Weighted(), window_bytes=0)
    with pytest.raises(ConfigError, match="credentials"):
        ModelService(Weighted(), address="0.0.0.0:0").open()
    with Listener(FREE, role="other") as other, pytest.raises(ConfigError, match=str(other.address.port)):
        ModelService(Weighted(), address=str(other.address)).open()
    with pytest.raises(ConfigError, match="does not listen"):
        ModelService(Weighted()).address  # noqa: B018
