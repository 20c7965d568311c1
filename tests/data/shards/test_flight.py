"""Rows of a Flight server are those it has, come once, and by TLS and token where that is asked."""

from __future__ import annotations

import builtins
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from certificates import issue
from data.shards.flight_server import table
from data.shards.made import used

from trainfleet.data import LocalBatches
from trainfleet.data.arrow import ArrowTable
from trainfleet.data.shards.flight import FlightTable, Server
from trainfleet.data.source import open_source
from trainfleet.errors import DataError, DependencyError

ENDS = [1500, 1600, 1600, 2700]
SERVER = Path(__file__).with_name("flight_server.py")


@pytest.fixture
def serve(tmp_path):
    running = []

    def start(folder=tmp_path, **says):
        say(folder, **says)
        process = subprocess.Popen([sys.executable, SERVER, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        running.append(process)
        return f"grpc{'+tls' if 'certificate' in says else ''}://127.0.0.1:{int(process.stdout.readline())}"

    yield start
    for process in running:
        process.stdin.close()
        process.stdout.close()
        process.kill()
        process.wait()


def say(folder, **says):
    (folder / "flight.json").write_text(json.dumps({"ends": ENDS} | says))


def calls(folder):
    return (folder / "calls").read_text().split() if (folder / "calls").exists() else []


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one)


def opened(tmp_path, location, **how):
    return FlightTable(location, **{"path": "rows", "cache": tmp_path / "cache"} | how)


@pytest.mark.parametrize("held", [True, False])
def test_rows_are_those_of_the_same_table_read_from_a_file(tmp_path, serve, monkeypatch, held):
    monkeypatch.setattr("trainfleet.data.shards.flight.HELD_BYTES", (256 << 20) * held)
    plain = table(0, 2700)
    plain = plain.set_column(3, "kind", plain["kind"].combine_chunks().dictionary_decode())
    with pa.ipc.new_file(tmp_path / "t.arrow", plain.schema) as file:
        file.write_table(plain)
    wanted = ArrowTable(tmp_path / "t.arrow")
    ours = open_source("flight", location=serve(), path="rows", cache=tmp_path / "cache")
    assert len(ours) == 2700 and ours.blocks.sizes == (1500, 100, 1100)
    for i in (0, 1, 7, 1023, 1024, 1499, 1500, 1599, 1600, 2623, 2624, 2699):
        found = ours[i]
        assert (
            same(found, wanted[i])
            and type(found["i"]) is np.int64
            and found["x"].dtype == np.float32
            and found["x"].flags.writeable
        )
    assert sorted(calls(tmp_path)) == ["0", "1500", "1600", "1600"], "each endpoint once, the empty one too"


def test_what_was_fetched_serves_those_who_come_later(tmp_path, serve):
    location = serve()
    opened(tmp_path, location)
    assert opened(tmp_path, location)[3]["i"] == 3 and len(calls(tmp_path)) == 4
    assert opened(tmp_path, location, path=None, command="select rows", columns={"n": "i"})[7] == {"n": 7}


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_with_workers_and_a_small_cache(tmp_path, serve, workers, monkeypatch):
    location = serve()
    large = opened(tmp_path, location, columns=["i", "x"], window=1)
    monkeypatch.setattr("trainfleet.data.shards.flight.HELD_BYTES", 0)
    room = max(shard.num_bytes for shard in large.shards) + min(shard.num_bytes for shard in large.shards)
    small = opened(tmp_path, location, columns=["i", "x"], window=1, cache=tmp_path / "small", cache_bytes=room + 999)
    with LocalBatches(small, size=100, epochs=1, workers=workers, collate="numpy") as stream:
        found = list(stream)
    wanted = list(LocalBatches(large, size=100, epochs=1, collate="numpy"))
    assert sorted(int(i) for batch in found for i in batch["i"]) == list(range(2700))
    assert all(same(*pair) for pair in zip(found, wanted)) and used(tmp_path / "small") <= room + 999


def test_a_stream_that_breaks_off_is_asked_for_again(tmp_path, serve):
    ours = opened(tmp_path, serve(breaks=2))
    assert len(ours) == 2700 and ours[2699]["i"] == 2699 and len(calls(tmp_path)) == 6


def test_a_ticket_that_has_run_out_is_renewed(tmp_path, serve):
    location = serve()
    ours = opened(tmp_path, location)
    say(tmp_path, round=1)
    for file in (tmp_path / "cache").glob("*.arrow"):
        file.unlink()
    assert ours[1501]["i"] == 1501


def test_a_server_that_is_away_or_has_no_such_thing_is_named(tmp_path, serve):
    with pytest.raises(DataError, match=r"grpc://127.0.0.1:1 gave nothing for 0.5 s"):
        opened(tmp_path, "grpc://127.0.0.1:1", timeout=0.5)
    with pytest.raises(DataError, match=r"cannot give 'other': .*there is no other"):
        opened(tmp_path, serve(), path="other")


def test_by_tls_and_token_and_not_without(tmp_path, serve):
    issue(tmp_path, "ca", ca=None)
    issue(tmp_path, "server", ca="ca")
    location = serve(token="secret", certificate=str(tmp_path / "server.pem"), key=str(tmp_path / "server.key"))
    ours = opened(tmp_path, location, roots=tmp_path / "ca.pem", token="secret")
    assert ours[9]["i"] == 9 and "secret" not in repr(ours)
    (tmp_path / "token").write_text("secret\n")
    assert opened(tmp_path, location, roots=tmp_path / "ca.pem", token=f"file:{tmp_path}/token")[3]["i"] == 3
    assert "secret" not in repr(Server(location=location, path="x", command=None, token="secret"))
    with pytest.raises(DataError, match=r"does not let us in: .*who are you.* Look at the token"):
        opened(tmp_path, location, roots=tmp_path / "ca.pem", token="wrong")
    with pytest.raises(DataError, match="gave nothing for 1 s"):
        opened(tmp_path, location, token="secret", timeout=1)


def test_a_token_goes_to_nobody_else(tmp_path, serve):
    (tmp_path / "other").mkdir()
    other = serve(tmp_path / "other")
    location = serve(token="secret", elsewhere=[other])
    assert opened(tmp_path, location, token="secret")[0]["i"] == 0
    assert calls(tmp_path) == [] and len(calls(tmp_path / "other")) == 4
    assert "secret" not in (tmp_path / "other" / "tokens").read_text()
    with pytest.raises(DataError, match="would be readable on its way"):
        opened(tmp_path, "grpc://far.example:1", token="secret")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"location": "127.0.0.1:1", "path": "x"}, "write grpc://"),
        ({"location": "grpc://h:1"}, "either a path or a command"),
        ({"location": "grpc://h:1", "path": "x", "command": "y"}, "either a path or a command"),
        ({"location": "grpc+tls://h:1", "path": "x", "roots": "/no/such"}, "/no/such cannot be read"),
    ],
)
def test_what_cannot_be_asked_is_a_sentence(how, words):
    with pytest.raises(DataError, match=words):
        FlightTable(**how)


def test_it_can_be_sent_to_another_process(tmp_path, serve):
    ours = pickle.loads(pickle.dumps(opened(tmp_path, serve())))
    assert ours[77]["i"] == 77


def test_without_pyarrow_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *args):
        if name.startswith("pyarrow"):
            raise ModuleNotFoundError(f"No module named {name!r}", name="pyarrow")
        return real(name, *args)

    for name in [name for name in sys.modules if name.split(".")[0] == "pyarrow"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr("importlib.import_module", without)
    with pytest.raises(DependencyError, match=r'Arrow Flight server needs the extra: pip install "trainfleet\[data\]"'):
        FlightTable("grpc://127.0.0.1:1", path="x")
