from __future__ import annotations

import re
import threading
import time
from datetime import timedelta

import pytest
from data.feed.made import Numbers, jitter, local, same
from left_behind import nothing_left_behind
from ssh_host import ssh_in_path

from trainfleet.data.config import DataConfig, SourceConfig
from trainfleet.data.feed import DataService
from trainfleet.data.feed.config import FeedConfig
from trainfleet.errors import ConfigError
from trainfleet.net.address import Address
from trainfleet.net.credentials import Credentials
from trainfleet.net.listener import Listener


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ({}, "names no feeders"),
        ({"feeders": ["(token)"]}, "not kept with a run"),
        ({"feeder": ["a:1"]}, "feeder"),
        ({"feeders": ["a:1"], "timeout": "soon"}, "timeout is 'soon'"),
        ({"listen": "0.0.0.0:7700"}, "there are no credentials"),
        ({"tunnel": "frp"}, "'frp' is no tunnel"),
        ({"tunnel": "ngrok", "feeders": ["a:1"]}, "do not go with it"),
    ],
)
def test_what_names_no_feeders_is_refused(args, sentence):
    with pytest.raises(ConfigError, match=sentence):
        FeedConfig.of(args)


def test_one_feeder_needs_no_list_and_seconds_no_unit():
    config = FeedConfig.of({"feeders": "cpu-0:7700", "timeout": 5})
    assert config.feeders == ("cpu-0:7700",) and config.timeout == timedelta(seconds=5)


def test_a_configured_stream_is_that_of_local_batches():
    held_out = local(Numbers(21), size=4, shuffle=False, short="keep", epochs=1)
    service = DataService(local(workers=0), evaluation=held_out, address="127.0.0.1:0")
    with nothing_left_behind(), service.open():
        args = {"feeders": [str(service.address)]}
        config = DataConfig(source="remote", args=args, evaluation=SourceConfig(source="remote"), seed=5)
        with (
            config.open_training(size=6, rank=1, world_size=2, seed=9) as training,
            config.open_evaluation(size=6) as evaluation,
        ):
            assert (training.size, training.seed, training.num_samples) == (6, 5, 100)
            expected = local(size=6, rank=1, world_size=2, seed=5)
            for _ in range(20):
                batch = {name: value.numpy() for name, value in next(training).items()}
                assert same(batch, next(expected))
            assert [len(batch["i"]) for batch in evaluation] == [6, 6, 6, 3]


def test_ranks_of_a_host_listen_at_ports_of_their_own(monkeypatch):
    config = FeedConfig(listen="127.0.0.1:7700")
    assert str(config._listen()) == "127.0.0.1:7700"
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert str(config._listen()) == "127.0.0.1:7701"


@pytest.fixture
def port():
    with Listener("127.0.0.1:0", role="trainer") as free:
        return free.address.port


def test_feeders_come_to_a_trainer_that_listens(port):
    service = DataService(local(transform=jitter), address=None, dials=[f"127.0.0.1:{port}"])
    with nothing_left_behind(), service.open(), FeedConfig(listen=f"127.0.0.1:{port}").open("training", size=8) as fed:
        assert same({name: value.numpy() for name, value in next(fed).items()}, next(local()))


def test_both_streams_of_a_trainer_that_listens_come_over_one_connection(port):
    held_out = local(Numbers(21), size=4, shuffle=False, short="keep", epochs=1)
    service = DataService(local(), evaluation=held_out, address=None, dials=[f"127.0.0.1:{port}"])
    config = FeedConfig(listen=f"127.0.0.1:{port}")
    with nothing_left_behind(), service.open():
        training, expected = config.open("training", size=8), local()
        evaluation = FeedConfig(listen=f"127.0.0.1:{port}").open("evaluation", size=8, short="keep", shuffle=False)
        assert service.served.trainers == 1 and evaluation.feeders is training.feeders
        for _ in range(3):
            for _ in range(5):
                assert same({name: value.numpy() for name, value in next(training).items()}, next(expected))
            evaluation.rewind()
            assert [len(batch["i"]) for batch in evaluation] == [8, 8, 5]
        training.close()
        evaluation.rewind()
        assert [len(batch["i"]) for batch in evaluation] == [8, 8, 5], "the other stream has gone, the feeders stay"
        evaluation.close()
        again = config.open("training", size=8)
        assert same({name: value.numpy() for name, value in next(again).items()}, next(local()))
        again.close()


def test_a_trainer_that_nobody_can_call_opens_a_tunnel_and_tells_the_line_to_run(tmp_path, monkeypatch, caplog):
    pytest.importorskip("cryptography", reason="what goes through a tunnel needs TLS, and so the extra `net`")
    caplog.set_level("INFO", "trainfleet")
    service = None

    def start_feeder():
        nonlocal service
        ends = time.monotonic() + 20
        while time.monotonic() < ends and service is None:
            if found := re.search(r"\n\n  trainfleet feed digits.yaml --dial (tf1_\S+)\n", caplog.text):
                service = DataService(local(), address=None, dials=[found[1]]).open()
            time.sleep(0.02)

    with nothing_left_behind(), ssh_in_path(tmp_path) as environment:
        monkeypatch.setenv("PATH", environment["PATH"])
        config = FeedConfig.of({"tunnel": "ssh:me@127.0.0.1", "recipe": "digits.yaml", "timeout": 20})
        home = threading.Thread(target=start_feeder)
        home.start()
        with config.open("training", size=8) as fed:
            assert same({name: value.numpy() for name, value in next(fed).items()}, next(local()))
        home.join()
        service.close()


def test_a_tunnel_leads_to_one_rank(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="leads to one rank, and there are 2"):
        FeedConfig(tunnel="cloudflared")


def test_a_trainer_that_others_can_reach_tells_its_token(port, tmp_path, caplog, monkeypatch):
    pytest.importorskip("cryptography", reason="TLS off loopback needs the extra `net`")
    monkeypatch.setattr("socket.gethostname", lambda: "127.0.0.1")
    config = FeedConfig(listen=f"0.0.0.0:{port}", identity=str(tmp_path / "kept"))
    place = Address("127.0.0.1", port)
    token = Credentials.make(folder=tmp_path / "kept").token([place])
    service = DataService(local(transform=jitter), address=None, dials=[str(token)])
    caplog.set_level("INFO", "trainfleet")
    with nothing_left_behind(), service.open(), config.open("training", size=8) as fed:
        assert same({name: value.numpy() for name, value in next(fed).items()}, next(local()))
    assert f"  trainfleet feed RECIPE --dial {token}\n" in caplog.text
