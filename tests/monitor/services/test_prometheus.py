from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from typing import Any

import pytest

from trainfleet.errors import ConfigError, DependencyError
from trainfleet.events import AlertFired, AnomalySeen, CheckpointFailed, Evaluated, RanksReported, RunEnded, Tracked
from trainfleet.monitor.services import prometheus
from trainfleet.monitor.services.prometheus import Prometheus, PrometheusConfig

pytest.importorskip("prometheus_client", reason="the extra `prometheus` is not installed")

RANKS = [
    {
        "host": "a",
        "system": {"cpu_percent": 50.0, "network/eth0/sent_bytes_per_second": 5.0, "gpu/0/power_watts": 300.0},
    },
    {"host": "b", "system": {}},
]


def scraped(observer: Prometheus) -> str:
    assert observer.address is not None
    with urllib.request.urlopen("http://{}:{}/metrics".format(*observer.address), timeout=5) as answer:
        return str(answer.read().decode())


def test_the_newest_numbers_can_be_scraped_by_names_of_the_convention(story: Any) -> None:
    observer = Prometheus(0)
    for event in (
        story.started(),
        *[story.step(n, loss=9.0 / n, phases={"data": 0.25}) for n in (1, 2, 3)],
        Evaluated(step=3, loss=4.0, metrics={"accuracy": 0.5}),
        Tracked(step=3, name="mine/x y", value=7.0),
        Tracked(step=3, name="bad", value="much"),  # type: ignore[arg-type]
        CheckpointFailed(step=3, reason="full"),
        AlertFired(step=3, alert="loss > 5", value=9.0),
        AnomalySeen(step=3, kind="slow_rank", what="x", policy="warn"),
        RanksReported(step=3, steps=3, ranks=RANKS),
        RunEnded(step=3, reason="finished", seconds=1.0),
    ):
        observer.on_event(event)
    page = scraped(observer)
    for line in (
        "trainfleet_loss 3.0",
        "trainfleet_step 3.0",
        "trainfleet_tokens_total 3072.0",
        "trainfleet_steps_total 3.0",
        'trainfleet_phase_seconds_total{phase="data"} 0.75',
        'trainfleet_validation{metric="accuracy"} 0.5',
        'trainfleet_tracked{name="mine/x y"} 7.0',
        'trainfleet_checkpoints_total{ended="failed"} 1.0',
        'trainfleet_alerts_total{alert="loss > 5"} 1.0',
        'trainfleet_anomalies_total{kind="slow_rank",policy="warn"} 1.0',
        'trainfleet_system_cpu_ratio{host="a",rank="0"} 0.5',
        'trainfleet_system_network_sent_bytes_per_second{device="eth0",host="a",rank="0"} 5.0',
        'trainfleet_system_gpu_power_watts{device="0",host="a",rank="0"} 300.0',
        "trainfleet_run_ended 1.0",
    ):
        assert f"\n{line}\n" in page, page
    names = {line.split()[2] for line in page.splitlines() if line.startswith("# TYPE")}
    assert all(re.fullmatch(r"trainfleet_[a-z0-9_]+", name) for name in names)
    observer.close()


def test_it_listens_on_the_loopback_and_gives_the_port_back(story: Any) -> None:
    observer = Prometheus(PrometheusConfig(port=0))
    assert observer.address is None, "nothing is opened before the run begins"
    observer.on_event(story.started())
    assert observer.address is not None and observer.address[0] == "127.0.0.1"
    observer.close()
    observer.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(observer.address, timeout=1)


def test_a_port_that_is_taken_is_a_warning(story: Any, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        observer = Prometheus(taken.getsockname()[1])
        observer.on_event(story.started())
        observer.on_event(story.step(1))
        observer.close()
    (message,) = caplog.messages
    assert "cannot be served at 127.0.0.1:" in message and "The run goes on without" in message


def test_of_thousands_of_names_the_first_are_kept(
    story: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prometheus, "MOST_NAMES", 50)
    observer = Prometheus(0)
    observer.on_event(story.started())
    for n in range(3000):
        observer.on_event(Tracked(step=1, name=f"n{n}", value=1.0))
    assert scraped(observer).count("trainfleet_tracked{") == 50
    observer.close()
    assert caplog.messages == [
        "Prometheus: trainfleet_tracked has 50 series; others are left out and counted.",
        "Prometheus: 2950 numbers were left out.",
    ]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_no_worker_holds_the_port_of_a_run_that_is_killed() -> None:
    program = """
import os, sys, time
from trainfleet.events import RunStarted
from trainfleet.monitor.services import Prometheus
observer = Prometheus(0)
observer.on_event(RunStarted(folder=None, steps=1, start_step=0, world_size=1, parameters=1, plan=""))
begun, begins = os.pipe()
if (child := os.fork()) == 0:
    sys.stdout.close(); os.close(1)
    os.write(begins, b".")
    time.sleep(30)
    os._exit(0)
os.read(begun, 1)
print(child, observer.address[1], flush=True)
time.sleep(30)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        child, port = map(int, run.stdout.readline().split())
        run.kill()
        run.wait()
        try:
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port), timeout=2)
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_port_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"monitor\.prometheus\.port is 70000"):
        PrometheusConfig(port=70000)


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(DependencyError, match=r'pip install "trainfleet\[prometheus\]"'):
        Prometheus(0)
