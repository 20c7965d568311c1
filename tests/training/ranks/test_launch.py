"""Starting ranks: results and failures come back in words, signals reach them, and nothing is left behind."""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import psutil
import pytest

pytest.importorskip("torch", reason="launching needs torch")

from free_ports import free_port

from trainfleet.comm import environment
from trainfleet.errors import DataError, LaunchError, PeerError, RankFailed
from trainfleet.mesh import Mesh
from trainfleet.training.ranks.launch import launch, run_elastic

pytestmark = pytest.mark.cluster

SOON = timedelta(seconds=1.5)


def script(folder: Path, text: str) -> list[str]:
    """The command that runs `text` as a rank."""
    path = folder / "rank.py"
    path.write_text("import os, signal, sys, time\nrank = int(os.environ['RANK'])\n" + text)
    return [sys.executable, str(path)]


# A function


def test_a_closure_runs_on_every_rank_and_results_come_back_by_rank():
    offset = 10  # as in a notebook: nobody else can look this function up

    def total(factor, *, extra):
        with Mesh.from_env(device="cpu") as mesh:
            return mesh.rank, sum(mesh.data_axes.exchange(mesh.rank * factor + offset + extra))

    assert launch(total, 3, (2,), {"extra": 1}) == [(rank, 2 * 3 + 3 * 11) for rank in range(3)]


def test_a_failing_function_is_reported_by_rank_line_and_cause_and_keeps_its_exit_code():
    def fail():
        with Mesh.from_env(device="cpu") as mesh:
            if mesh.rank == 1:
                raise DataError("There is no sample 7.", hint="Look at the folder.")
            mesh.data_axes.barrier()  # fails too, since a peer is gone: not the cause

    with pytest.raises(
        RankFailed, match=r"^Rank 1 of 2 .*test_launch\.py:\d+ in fail: There is no sample 7\."
    ) as caught:
        launch(fail)
    assert caught.value.exit_code == DataError.exit_code
    assert caught.value.hint == "Look at the folder."
    assert "raise DataError" in str(caught.value.__cause__)


def listening() -> set[int]:
    return {c.laddr.port for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN}


def test_signal_handlers_and_ports_are_as_before():
    gc.collect()  # of the errors of earlier tests, whose frames may hold a port
    others = listening()
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)]
    launch(lambda: None, 1)
    with pytest.raises(RankFailed) as kept:  # as a notebook keeps the last error
        launch(lambda: 1 / 0, 1)
    assert "ZeroDivisionError" in str(kept.value)
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)] == before
    assert listening() == others


def test_launch_within_a_rank_and_impossible_numbers_are_refused(monkeypatch):
    with pytest.raises(LaunchError, match="nproc is 0"):
        launch(print, 0)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(LaunchError, match="in rank 1 of 2"):
        launch(print)


SCRIPT = """
import sys
from trainfleet.training.ranks.launch import launch
from trainfleet.errors import TrainfleetError

def square(x):
    import os
    return x * x + int(os.environ["RANK"])

GUARD
    def hidden():
        pass
    print(launch(square, 2, (3,)))
    try:
        launch(hidden, 1)
    except TrainfleetError as exc:
        print(exc.exit_code, exc, exc.hint)
"""


def test_a_script_gets_its_results_and_learns_what_a_fresh_interpreter_cannot_find(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(SCRIPT.replace("GUARD", 'if __name__ == "__main__":'))
    out = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=100)
    first, second = out.stdout.splitlines()
    assert first == "[9, 10]"
    assert second.startswith(f"{LaunchError.exit_code} Rank 0 of 1")
    assert "hidden" in second
    assert "outside of `if __name__" in second


def test_a_script_without_a_guard_is_told_so(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(SCRIPT.replace("GUARD", "if True:"))
    out = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=100)
    assert "came upon launch() again" in out.stderr
    assert out.stderr.count("Traceback") == 1  # of the script itself; its copies are silent


# A command


def test_a_command_runs_as_ranks_with_their_share_of_the_cores(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    command = script(
        tmp_path,
        "names = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'OMP_NUM_THREADS')\n"
        "text = ' '.join([os.environ[n] for n in names] + sys.argv[2:])\n"
        "open(sys.argv[1] + str(rank), 'w').write(text)\n",
    )
    assert run_elastic([*command, str(tmp_path / "out"), "a $b $$c"], nproc=2) == 0
    threads = environment.threads_per_rank(2, {})
    for rank in range(2):
        assert (tmp_path / f"out{rank}").read_text() == f"{rank} 2 {rank} {threads} a $b $$c"
    assert environment.threads_per_rank(2, {"OMP_NUM_THREADS": "5"}) is None


@pytest.mark.parametrize(
    ("death", "words"),
    [
        ("sys.exit(3)", "ended with exit code 3 and left no report"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "was killed by SIGKILL"),
    ],
)
def test_a_rank_that_dies_without_a_word_is_named(tmp_path, death, words):
    command = script(tmp_path, f"time.sleep(0.2)\nif rank == 1: {death}\ntime.sleep(60)")
    began = time.monotonic()
    with pytest.raises(RankFailed, match=f"Rank 1 of 2 .*{words}") as caught:
        run_elastic(command, nproc=2)
    assert caught.value.exit_code == RankFailed.exit_code
    assert time.monotonic() - began < 10


def test_a_command_that_is_not_there_is_named(tmp_path, capfd):
    with pytest.raises(RankFailed):
        run_elastic([str(tmp_path / "nothing")], nproc=1)
    assert "cannot be started: No such file" in capfd.readouterr().err


def test_ranks_start_anew_as_often_as_allowed(tmp_path):
    command = script(
        tmp_path,
        "attempt = os.environ['TORCHELASTIC_RESTART_COUNT']\n"
        "open(f'{sys.argv[1]}/attempt-{attempt}-{rank}', 'w')\n"
        "sys.exit(attempt == '0' and rank == 0)\n",
    )
    assert run_elastic([*command, str(tmp_path)], nproc=2, max_restarts=1) == 0
    assert (tmp_path / "attempt-1-1").exists()


# Signals and what is left behind

LAUNCHER = """
import json, sys
from datetime import timedelta
from trainfleet.training.ranks.launch import run_elastic
sys.exit(run_elastic(json.loads(sys.argv[1]), nproc=2, grace=timedelta(seconds=float(sys.argv[2]))))
"""


def start(folder: Path, text: str, *, grace: float = 20) -> tuple[subprocess.Popen[bytes], list[int]]:
    """A launcher in a process of its own, and the ids of its two ranks once they are up."""
    preface = f"def done(word): open(f'{folder}/{{word}}-{{rank}}', 'w').write(str(os.getpid()))\n"
    command = [*script(folder, preface + text)]
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, json.dumps(command), str(grace)])
    ends = time.monotonic() + 60
    while time.monotonic() < ends:
        pids = [path.read_text() for path in folder.glob("up-*")]
        if len(pids) == 2 and all(pids):
            return launcher, [int(pid) for pid in pids]
        time.sleep(0.02)
    launcher.kill()
    raise TimeoutError("The ranks did not come up.")


def gone(pids: list[int], seconds: float = 10) -> bool:
    ends = time.monotonic() + seconds
    while any(psutil.pid_exists(pid) for pid in pids):
        if time.monotonic() > ends:
            return False
        time.sleep(0.02)
    return True


SAVES = """
def save(number, frame):
    time.sleep(0.3)
    done('saved')
    sys.exit(0)
signal.signal(signal.SIGINT, save)
signal.signal(signal.SIGTERM, save)
done('up')
time.sleep(60)
"""

STUBBORN = """
signal.signal(signal.SIGINT, lambda *_: done('told'))
signal.signal(signal.SIGTERM, signal.SIG_IGN)
done('up')
end = time.time() + 60
while time.time() < end: time.sleep(0.1)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_passed_on_and_ranks_save(tmp_path, number):
    launcher, ranks = start(tmp_path, SAVES)
    launcher.send_signal(number)
    assert launcher.wait(20) == 128 + number
    assert len(list(tmp_path.glob("saved-*"))) == 2
    assert gone(ranks)


def test_a_second_ctrl_c_kills(tmp_path):
    launcher, ranks = start(tmp_path, STUBBORN)
    launcher.send_signal(signal.SIGINT)
    while len(list(tmp_path.glob("told-*"))) < 2:
        time.sleep(0.02)
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(15) == 130
    assert gone(ranks)


def test_ranks_that_do_not_end_within_their_grace_are_killed(tmp_path):
    launcher, ranks = start(tmp_path, STUBBORN, grace=1)
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(15) == 130
    assert gone(ranks)


def test_ranks_die_with_a_killed_launcher(tmp_path):
    launcher, ranks = start(tmp_path, STUBBORN)
    launcher.kill()
    launcher.wait(10)
    assert gone(ranks)


# Several hosts, as far as one host can show it; two of them are in tests/cluster/test_two_hosts.py


def test_an_occupied_port_is_explained():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(LaunchError, match=f"Port {port} of this host is in use"):
            run_elastic(["true"], nproc=1, nnodes=2, node_rank=0, rendezvous=f"127.0.0.1:{port}", timeout=SOON)


def test_a_closed_port_is_explained_at_the_deadline():
    port = free_port()
    began = time.monotonic()
    with pytest.raises(PeerError, match=f"Host 1 could not reach 127.0.0.1:{port} within 1.5 s: the port is closed"):
        run_elastic(["true"], nproc=1, nnodes=2, node_rank=1, rendezvous=f"127.0.0.1:{port}", timeout=SOON)
    assert time.monotonic() - began < 4


def test_an_unknown_host_is_explained():
    with pytest.raises(PeerError, match="does not know that name"):
        run_elastic(["true"], nproc=1, nnodes=2, node_rank=1, rendezvous="nowhere.invalid:1", timeout=SOON)


def test_a_host_that_does_not_come_is_named():
    with pytest.raises(PeerError, match=r"Of 2 hosts, host 1 did not come within 1.5 s"):
        run_elastic(["true"], nproc=1, nnodes=2, node_rank=0, rendezvous=f"127.0.0.1:{free_port()}", timeout=SOON)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"nnodes": 2}, "no rendezvous"),
        ({"nnodes": 2, "rendezvous": "a:b"}, "write host:port"),
        ({"nnodes": 2, "rendezvous": "127.0.0.1:1", "node_rank": 2}, "numbered 0 to 1"),
        ({"nnodes": 3, "rendezvous": "nowhere.invalid:1"}, "needs its number"),
        ({"nproc": 0}, "nproc is 0"),
    ],
)
def test_impossible_numbers_of_hosts_are_refused_at_once(arguments, words):
    with pytest.raises(LaunchError, match=words):
        run_elastic(["true"], **{"nproc": 1, "timeout": SOON, **arguments})


def test_no_report_is_written_outside_of_our_own_ranks(monkeypatch):
    from trainfleet.training.ranks.failure import reported_failures

    for name in [name for name in os.environ if name.startswith("TORCHELASTIC")]:
        monkeypatch.delenv(name)
    with pytest.raises(ValueError, match="plain"), reported_failures():
        raise ValueError("plain")
