"""Answers from other hosts are the local ones, in order, once each, whatever happens to the services."""

from __future__ import annotations

import itertools
import time
from datetime import timedelta

import numpy as np
import pytest
from left_behind import nothing_left_behind
from serve.made import PREDICT, VALIDATE, Weighted, all_same, batches, local, same

from trainfleet.errors import ConfigError, DataError, NotAdmitted, OutOfMemory, PeerError
from trainfleet.net.credentials import Credentials
from trainfleet.net.listener import Listener
from trainfleet.net.relay import Relay
from trainfleet.serve.remote import RemoteModel
from trainfleet.serve.service import ModelService
from trainfleet.serve.terms import Answering

FREE = "127.0.0.1:0"
SOON = timedelta(seconds=3)


@pytest.fixture
def serve():
    with nothing_left_behind():
        services = []

        def start(model=None, address=FREE, **settings):
            services.append(ModelService(model or Weighted(), address=address, **settings).open())
            return services[-1]

        yield start
        for service in services:
            service.close()


def remote(*services, **settings):
    return RemoteModel([str(service.address) for service in services], **settings)


@pytest.mark.parametrize("count", [1, 2])
def test_answers_are_those_of_the_model_here_to_the_bit(serve, count):
    models = [Weighted() for _ in range(count)]
    with remote(*[serve(model) for model in models]) as model:
        assert isinstance(model, Answering) and model.digest == "weight-3"
        for terms in (VALIDATE, PREDICT):
            assert all_same(model.answers(batches(), terms), local(terms=terms))
        assert model.services.lost == model.services.held_bytes == 0
    assert sum(each.asked for each in models) >= 80


def test_both_services_are_used(serve):
    models = [Weighted(seconds=0.005) for _ in range(2)]
    with remote(*[serve(model) for model in models]) as model:
        model.digest  # noqa: B018
        while model.services.connected < 2:
            time.sleep(0.01)
        assert all_same(model.answers(batches(), VALIDATE), local())
    assert all(each.asked >= 8 for each in models)


def test_a_slow_service_does_not_hold_up_the_others(serve):
    begun = time.monotonic()
    with remote(serve(Weighted(seconds=0.15)), serve(Weighted())) as model:
        assert all_same(model.answers(batches(60), VALIDATE), local(60))
    assert time.monotonic() - begun < 6, "9 s at the slow one"


def test_it_is_read_no_further_ahead_than_the_window_allows(serve):
    service, taken = serve(Weighted()), []

    def counted():
        for batch in batches(200, rows=256, width=64):  # 64 KiB each
            taken.append(len(taken))
            yield batch

    with remote(service, window_bytes=1 << 18) as model:
        answers = model.answers(counted(), VALIDATE)
        for number, _ in enumerate(itertools.islice(answers, 100)):
            assert len(taken) - number <= 5 + 1, "four fit, and the one that goes over"
            assert model.services.held_bytes <= (1 << 18) + (1 << 16)
        time.sleep(0.2)
        assert len(taken) <= 106, "nothing is read while nobody asks"
        answers.close()


def test_an_answer_does_not_wait_for_batches_that_are_slow_to_come(serve):
    taken = []

    def slow():
        for batch in batches(20):
            time.sleep(0.03)
            taken.append(1)
            yield batch

    with remote(serve()) as model:
        answers = model.answers(slow(), VALIDATE)
        for number, expected in enumerate(local(20)):
            assert same(next(answers), expected) and len(taken) <= number + 4


def test_what_a_batch_met_is_told_in_its_turn_with_its_rows_and_the_service_lives_on(serve):
    service = serve()
    good = list(batches(6))

    def with_one(bad):
        return [*good[:3], bad, *good[3:]]

    wrong = {"x": np.zeros(5, np.float32)}
    with remote(service) as model:
        answers, expected = model.answers(with_one(wrong), VALIDATE), local(6)
        for number in range(3):
            assert same(next(answers), expected[number])
        with pytest.raises(DataError, match=r"Rows 24 to 28: x has 1 dimensions") as caught:
            next(answers)
        assert caught.value.hint == "Give [rows, width]."
        with pytest.raises(OutOfMemory, match=r"Rows 24 to 23: The batch does not fit .* 2.00 GiB") as full:
            list(model.answers(with_one({"x": np.zeros((0, 5), np.float32)}), VALIDATE))
        assert "smaller" in str(full.value.hint)
        with pytest.raises(DataError, match="The model failed on it: KeyError: 'x'"):
            list(model.answers([{"y": np.zeros((2, 2))}], VALIDATE))
        with pytest.raises(DataError, match=r"Rows 0 to 1: .*object"):
            list(model.answers([{"x": np.zeros((2, 2)), "y": object()}], VALIDATE))
        assert all_same(model.answers(batches(), VALIDATE), local())
    assert service.served.failed == 3


def test_nan_is_an_answer(serve):
    with remote(serve()) as model:
        (answer,) = model.answers([{"x": np.full((2, 2), np.nan, np.float32)}], VALIDATE)
        assert np.isnan(answer["sums"]).all()


def test_one_that_was_left_in_the_middle_can_be_asked_again(serve):
    service = serve(Weighted(seconds=0.01))
    with remote(service) as model:
        for _ in range(3):
            answers = model.answers(batches(), PREDICT)
            next(answers)
            with pytest.raises(ConfigError, match="answering for other batches"):
                next(model.answers(batches(), VALIDATE))
            answers.close()
        assert model.services.held_bytes == 0
        assert all_same(model.answers(batches(10), VALIDATE), local(10))


def test_services_may_come_and_go(serve):
    first = serve()
    with Listener(FREE, role="free") as free:
        later = str(free.address)
    with RemoteModel([str(first.address), later]) as model:
        answers, expected = model.answers(batches(300), VALIDATE), iter(local(300))
        assert all(same(next(answers), next(expected)) for _ in range(50))
        second = serve(address=later)
        deadline = time.monotonic() + 20
        while model.services.connected < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        address = str(first.address)
        first.close()
        assert all(same(next(answers), next(expected)) for _ in range(100))
        assert model.services.lost == 1
        second.close()
        serve(address=address)
        assert all_same(answers, expected)


def test_other_weights_are_refused_in_words(serve, caplog):
    ours, others = serve(Weighted(3)), serve(Weighted(4))
    with RemoteModel([str(ours.address)]) as model:
        assert model.digest == "weight-3"
    with remote(ours) as model:
        model.digest  # noqa: B018
        ours.close()
        changed = serve(Weighted(4), address=str(ours.address))
        with pytest.raises(NotAdmitted, match=r"has other weights of Weighted \(weight-4\) than those before it"):
            list(model.answers(batches(), VALIDATE))
        changed.close()
    mixed = [serve(Weighted(3)), others]
    with remote(*mixed) as model:
        weight = int(model.digest.rpartition("-")[2])
        assert all_same(model.answers(batches(), VALIDATE), local(weight=weight)), "never those of both"
    assert "Start all services with the same checkpoint" in str(caplog.records) or "other weights" in caplog.text


def test_a_token_is_all_that_a_client_needs_off_loopback(serve):
    pytest.importorskip("cryptography", reason="identities need the extra `net`")
    service = serve(credentials=Credentials.make())
    with RemoteModel(str(service.token())) as model:
        assert all_same(model.answers(batches(), VALIDATE), local())
    wrong = str(Credentials.make().token([service.address]))
    with RemoteModel(wrong, timeout=SOON) as model, pytest.raises(NotAdmitted):
        model.digest  # noqa: B018


def test_a_client_may_listen_and_be_called(serve):
    with Listener(FREE, role="free") as free:
        place = str(free.address)
    serve(address=None, dials=[place])
    for _ in range(2):
        with RemoteModel(listen=place) as model:
            assert all_same(model.answers(batches(), VALIDATE), local())


def test_both_may_meet_at_a_relay(serve):
    pytest.importorskip("cryptography", reason="identities need the extra `net`")
    with Relay(FREE, credentials=Credentials.make()) as relay:
        service = serve(address=None, via=relay.token(), credentials=Credentials.make())
        with RemoteModel(str(service.token())) as model:
            assert all_same(model.answers(batches(), VALIDATE), local())
        service.close()


def test_no_service_at_all_is_said_at_the_deadline(serve):
    service = serve()
    with remote(service, timeout=timedelta(seconds=1)) as model:
        next(model.answers(batches(), VALIDATE))
        service.close()
        with pytest.raises(PeerError, match=r"no gpu-service was there.*the port is closed"):
            list(model.answers(batches(), VALIDATE))


@pytest.mark.parametrize("wrong", [{}, {"services": "127.0.0.1:1", "window_bytes": 0}, {"services": "a:b:c"}])
def test_what_cannot_be_is_refused(wrong):
    with nothing_left_behind(), pytest.raises(ConfigError):
        RemoteModel(**wrong, timeout=SOON).digest  # noqa: B018
