"""`trainfleet feed` says what it serves and how to get it, and ends without leaving anything behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from feeding import FeederProcess, write_job
from ssh_host import ssh_in_path

from trainfleet.cli.feed import _places
from trainfleet.cli.main import main
from trainfleet.data.feed import RemoteBatches
from trainfleet.errors import NotAdmitted
from trainfleet.net.listener import Listener
from trainfleet.net.token import Token

SOON = timedelta(seconds=20)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_job(tmp_path)


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return int(ended.value.code or 0)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_a_recipe_is_served_until_a_signal(path: Path, end: int) -> None:
    with FeederProcess(path, "--listen", "127.0.0.1:0", "data.workers=2") as feeder:
        with RemoteBatches(feeder.reached_by, as_numpy=True, timeout=SOON) as batches:
            assert next(batches)["input"].shape == (8, 4) and batches.num_samples == 90
            feeder.find(r"(Trainer \S+ is here)")
            tree = subprocess.run(["ps", "-o", "pid=", "-g", str(feeder.process.pid)], capture_output=True, text=True)
        feeder.find(r"(Trainer \S+ is done: \d+ batches)")
        assert feeder.stop(end) == 0, feeder.said
        pids = [int(word) for word in tree.stdout.split()]
        assert len(pids) >= 3 and not any(is_running(pid) for pid in pids)
    assert "training    90 samples" in feeder.said and "evaluation  21 samples" in feeder.said
    assert "made by     2 workers" in feeder.said and "only this host can connect" in feeder.said
    assert f"trainfleet train {path} --feed 127.0.0.1:" in feeder.said and "Traceback" not in feeder.said
    assert feeder.said.splitlines()[-1].startswith("Ended after ")


def test_off_loopback_a_token_is_printed_and_kept(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("cryptography", reason="TLS off loopback needs the extra `net`")
    options = ["--address", "127.0.0.1", "--folder", str(tmp_path / "kept")]
    with FeederProcess(path, "--listen", "0.0.0.0:0", *options) as feeder:
        token = feeder.reached_by
        with RemoteBatches(token, stream="evaluation", as_numpy=True, timeout=SOON) as batches:
            assert next(batches)["input"].shape == (8, 4)
        wrong = Token.make(Token.parse(token).addresses, fingerprint=bytes(32))
        with pytest.raises(NotAdmitted):
            RemoteBatches(str(wrong), timeout=SOON)
        port = Token.parse(token).addresses[0].port
        assert feeder.stop(signal.SIGKILL) == -signal.SIGKILL
    with FeederProcess(path, "--listen", f"0.0.0.0:{port}", *options) as again:
        assert again.reached_by == token
        assert again.stop() == 0


def test_a_tunnel_brings_trainers_where_nobody_can_dial(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("cryptography", reason="what goes through a tunnel needs TLS, and so the extra `net`")
    options = ["--listen", "127.0.0.1:0", "--tunnel", "ssh:me@127.0.0.1"]
    with ssh_in_path(tmp_path) as environment, FeederProcess(path, *options, env=environment) as feeder:
        token = Token.parse(feeder.reached_by)
        assert str(token.addresses[0]) != feeder.find(r"listens at +(\S+)") and token.fingerprint is not None
        assert feeder.find(r"called +(\S+)") == str(token.addresses[0])
        with RemoteBatches(token, as_numpy=True, timeout=SOON) as batches:
            assert next(batches)["input"].shape == (8, 4)
        assert feeder.stop() == 0


@pytest.mark.matrix
def test_a_trainer_that_nobody_can_call_prints_the_line_that_feeds_it(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("cryptography", reason="what goes through a tunnel needs TLS, and so the extra `net`")
    command = [sys.executable, "-m", "trainfleet.cli.main", "train", str(path), "--tunnel", "ssh:me@127.0.0.1"]
    with ssh_in_path(tmp_path) as environment:
        training = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=path.parent
        )
        said = ""
        try:
            assert training.stdout is not None
            while not (found := re.search(rf"^  trainfleet feed {path} --dial (tf1_\S+)$", said, re.MULTILINE)):
                line = training.stdout.readline()
                assert line, said
                said += line
            with FeederProcess(path, "--dial", found[1]) as feeder:
                rest, _ = training.communicate(timeout=100)
                assert feeder.stop() == 0
        finally:
            training.kill()
    assert training.returncode == 0, said + rest
    assert "is done: " in feeder.said and feeder.said.count("is here") == 1, "both streams come over one connection"
    written = "".join(
        entry.read_text() for entry in (tmp_path / "run").glob("*.*") if entry.suffix in (".yaml", ".jsonl")
    )
    assert '"waits"' in written and "tunnel: ssh:me@127.0.0.1" in written and found[1] not in written


def test_a_trainer_that_listens_is_called(path: Path) -> None:
    with Listener("127.0.0.1:0", role="trainer") as free:
        port = free.address.port
    with FeederProcess(path, "--dial", f"127.0.0.1:{port}") as feeder:
        with RemoteBatches(listen=f"127.0.0.1:{port}", as_numpy=True, timeout=SOON) as batches:
            assert next(batches)["input"].shape == (8, 4)
        assert feeder.stop() == 0
    assert f"calls       127.0.0.1:{port}" in feeder.said and "listens at" not in feeder.said


def test_several_ports_of_a_trainer_are_counted_from_the_first() -> None:
    assert [str(place) for place in _places("gpu:7700", 3)] == ["gpu:7700", "gpu:7701", "gpu:7702"]
    token = Token.make(["gpu:7700"], fingerprint=bytes(32))
    _, second = _places(str(token), 2)
    assert isinstance(second, Token) and str(second.addresses[0]) == "gpu:7701" and second.secret == token.secret


def test_what_is_in_the_way_is_a_sentence(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Listener("127.0.0.1:0", role="feeder") as taken:
        assert run("feed", str(path), "--listen", str(taken.address)) == 2
        assert f"Port {taken.address.port} of this host is in use" in capsys.readouterr().err
    remote = ["data.source=remote", "data.args={feeders: [a]}"]
    assert run("feed", str(path), *remote) == 2
    assert "this recipe is for the side that trains" in capsys.readouterr().err
    assert run("feed", str(path), "--listen", "no-such-host.invalid:7700", "--certs", str(path.parent)) == 2
    assert run("train", str(path), "--certs", "x") == 2
    assert "--certs is for --feed" in capsys.readouterr().err
    assert run("feed", str(path), "--tunnel", "frp") == 2
    assert "Write ssh:USER@HOST" in capsys.readouterr().err
    assert run("feed", str(path), "--tunnel", "ngrok", "--certs", str(path.parent)) == 2
    assert "--tunnel leads here by a token" in capsys.readouterr().err
    assert run("train", str(path), "--tunnel", "ngrok", "--feed", "a:1") == 2
    assert "Give one of the two" in capsys.readouterr().err
    for more in (["--nproc", "2"], ["--max-restarts", "1"]):
        assert run("train", str(path), "--tunnel", "ngrok", *more) == 2
        assert "A tunnel leads to one process" in capsys.readouterr().err


def test_training_without_a_feeder_ends_with_its_code(path: Path) -> None:
    pytest.importorskip("torch")
    with Listener("127.0.0.1:0", role="feeder") as free:
        gone = str(free.address)
    over = ["data.source=remote", f"data.args={{feeders: ['{gone}'], timeout: 0.5}}", "data.evaluation=null"]
    command = [sys.executable, "-m", "trainfleet.cli.main", "train", str(path), *over, "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ, cwd=path.parent)
    assert done.returncode == 9 and "Traceback" not in done.stderr
    assert "Waited 0.5 s for the first feeder, and no feeder was there" in done.stderr
    assert "Start one with `trainfleet feed`" in done.stderr
