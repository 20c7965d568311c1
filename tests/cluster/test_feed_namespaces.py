"""Two network namespaces act as the CPU host and the GPU host: batches cross a cable under TLS, by a token."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from data.feed.made import local
from namespaces import Hosts, two_hosts

pytest.importorskip("cryptography", reason="TLS off loopback needs the extra `net`")

pytestmark = pytest.mark.cluster

CPU, GPU = 0, 1
TESTS = Path(__file__).parents[1]
BATCHES = 30

FEEDER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from data.feed.made import local
from trainfleet.data.feed import DataService
from trainfleet.net.credentials import Credentials

with DataService(local(), address="0.0.0.0:7700", credentials=Credentials.make()).open() as service:
    print(service.listener.token([sys.argv[2] + ":7700"]), flush=True)
    time.sleep(300)
"""

TRAINER = """
import hashlib, sys, time
from datetime import timedelta
from trainfleet.data.feed import RemoteBatches

digest = hashlib.sha256()
with RemoteBatches([sys.argv[1]], as_numpy=True, timeout=timedelta(seconds=30)) as batches:
    for number in range(int(sys.argv[2])):
        batch = next(batches)
        for name in sorted(batch):
            digest.update(name.encode() + batch[name].tobytes())
        time.sleep(float(sys.argv[3]))
    print(digest.hexdigest(), batches.feeders.lost, flush=True)
"""


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with two_hosts() as made:
        made.limit("100mbit")
        yield made


@contextmanager
def running(hosts: Hosts, host: int, command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """Ends it, and reads what it has said, so that it cannot stand still for a full pipe."""
    process = hosts.start(host, command)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


@contextmanager
def feeding(hosts: Hosts) -> Iterator[str]:
    """A token of a data service on the CPU host."""
    with running(hosts, CPU, [sys.executable, "-c", FEEDER, str(TESTS), Hosts.addresses[CPU]]) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()


def on(hosts: Hosts, host: int, command: list[str], timeout: float = 60) -> tuple[int, str, str]:
    process = hosts.start(host, command)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, out, err


def local_digest(batches: int) -> str:
    digest, stream = hashlib.sha256(), local()
    for _ in range(batches):
        batch = next(stream)
        for name in sorted(batch):
            digest.update(name.encode() + batch[name].tobytes())
    return digest.hexdigest()


def test_batches_cross_the_cable_under_tls_and_the_doctor_finds_its_rate(hosts):
    with feeding(hosts) as token:
        assert token.startswith("tf1_")
        code, out, err = on(hosts, GPU, [sys.executable, "-c", TRAINER, token, str(BATCHES), "0"])
        assert code == 0, err
        assert out.split() == [local_digest(BATCHES), "0"]
        code, out, err = on(hosts, GPU, [sys.executable, "-m", "trainfleet.cli.main", "doctor", token, "--json"])
        assert code == 0, err + out
    found = {finding["subject"]: finding for finding in json.loads(out)}
    assert found["TLS"]["fact"].startswith("TLSv1.3, ")
    for way in ("rate up", "rate down"):
        megabits = float(found[way]["fact"].split("(")[1].split()[0])
        assert 20 < megabits < 105, "what 100 Mbit/s leave after TCP and TLS, on a host that may be busy"


def test_without_a_token_nobody_comes_in_from_another_host(hosts):
    with feeding(hosts):
        address = f"{Hosts.addresses[CPU]}:7700"
        code, _, err = on(hosts, GPU, [sys.executable, "-c", TRAINER, address, "1", "0"])
        assert code == 1 and "There are no credentials for 10.213.7.1:7700, which is not this host" in err


@pytest.mark.matrix
@pytest.mark.parametrize("seconds", [3.0, 20.0])
def test_a_cable_that_is_pulled_and_plugged_in_again_loses_nothing(hosts, seconds):
    """For less than the silence that ends a connection, and for more."""
    with feeding(hosts) as token, running(hosts, GPU, [sys.executable, "-c", TRAINER, token, "300", "0.02"]) as trainer:
        time.sleep(3)
        hosts.unplug()
        plug = threading.Timer(seconds, hosts.plug_in)
        plug.start()
        try:
            out, err = trainer.communicate(timeout=120)
        finally:
            plug.join()
        assert trainer.returncode == 0, err
        digest, lost = out.split()
        assert digest == local_digest(300)
        assert int(lost) >= (seconds > 10)


@pytest.mark.matrix
@pytest.mark.parametrize("listens", ["feeder", "trainer"])
def test_a_recipe_that_is_fed_has_the_weights_of_the_one_that_is_not(hosts, tmp_path, listens):
    pytest.importorskip("torch", reason="a recipe trains with torch")
    from killed_run import STEPS, losses, same, states_at, write_job

    for name in ("reference", "cpu", "gpu"):
        write_job(tmp_path / name)
    program = [sys.executable, "-m", "trainfleet.cli.main"]
    reference = [*program, "train", "recipe.yaml", "--nproc", "2"]
    subprocess.run(reference, cwd=tmp_path / "reference", check=True, capture_output=True, timeout=180)

    def there(name: str, *words: str) -> list[str]:
        return ["env", "-C", str(tmp_path / name), *program, *words]

    train = ["train", "recipe.yaml", "--nproc", "2"]
    if listens == "feeder":
        feed = ["feed", "recipe.yaml", "--listen", "0.0.0.0:7700", "--address", Hosts.addresses[CPU]]
        with running(hosts, CPU, there("cpu", *feed)) as feeder:
            code, out, err = on(hosts, GPU, there("gpu", *train, "--feed", word_of(feeder, "--feed")), 180)
    else:
        args = f"{{listen: '{Hosts.addresses[GPU]}:7710', identity: keys}}"
        options = ["data.source=remote", f"data.args={args}", "data.workers=0"]
        with running(hosts, GPU, there("gpu", *train, *options)) as trainer:
            assert trainer.stderr is not None
            token = next(line.split()[-1] for line in trainer.stderr if "--dial" in line)
            feed = ["feed", "recipe.yaml", "--dial", token, "--ports", "2"]
            with running(hosts, CPU, there("cpu", *feed)):
                out, err = trainer.communicate(timeout=180)
                code = trainer.returncode
    assert code == 0, out + err
    assert losses(tmp_path / "gpu") == losses(tmp_path / "reference")
    assert same(states_at(tmp_path / "gpu", STEPS), states_at(tmp_path / "reference", STEPS))


def word_of(process: subprocess.Popen[str], before: str) -> str:
    """What stands behind a word in what it prints."""
    assert process.stdout is not None
    for line in process.stdout:
        if before in line:
            return line.split(before, 1)[1].split()[0]
    raise AssertionError(f"it ended without {before}")
