"""Troubles that are planted on a machine and in runs: `trainfleet doctor` names each, and none where all is well.

Planted for real, by namespaces, limits, control groups, variables and files, unless a test's name says `faked`.
"""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from planted_run import HEALTHY, ended, healthy_events, report, started, step, write_run

import trainfleet
from trainfleet.cli.main import main
from trainfleet.deps import installed
from trainfleet.events import CheckpointFailed, Evaluated

pytestmark = pytest.mark.cluster

DOCTOR = [sys.executable, "-m", "trainfleet.cli.main", "doctor", "--json"]
PACKAGE = Path(trainfleet.__file__).parents[1]
HURTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "GLOO_SOCKET_IFNAME", "RANK", "WORLD_SIZE", "LOCAL_RANK")
NAMESPACES = ["unshare", "--net", "--mount"] if os.geteuid() == 0 else ["unshare", "-r", "--net", "--mount"]

Findings = dict[str, dict[str, Any]]


def can(command: list[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=10).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


in_namespaces = pytest.mark.skipif(not can([*NAMESPACES, "true"]), reason="namespaces are not ours to make")
with_torch = pytest.mark.skipif(installed("torch") is None, reason="it is torch's trouble")


def doctor(
    folder: Path,
    *options: str,
    inside: list[str] | None = None,
    before: Callable[[], None] | None = None,
    first: Path | None = None,
    **variables: str,
) -> tuple[int, Findings]:
    """Exit code and findings by subject of a doctor in `folder`, its rows of the outlook as `will: ...`.

    inside: the command that it is started by; before: called in its process; first: a folder before all others on its
    path. Of several findings of one subject the worst is given.
    """
    there = {name: value for name, value in os.environ.items() if name not in HURTS and "proxy" not in name.lower()}
    path = [str(first)] * (first is not None) + [str(PACKAGE)]
    done = subprocess.run(
        [*(inside or []), *DOCTOR, *options],
        cwd=folder,
        env={**there, "PYTHONPATH": os.pathsep.join(path), **variables},
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=before,
    )
    assert done.returncode in (0, 1), done.stderr
    found: Findings = {}
    for each in json.loads(done.stdout):
        subject = f"will: {each['subject']}" if each["outlook"] else each["subject"]
        if found.get(subject, {}).get("verdict", "ok") in ("ok", "note"):
            found[subject] = each
    return done.returncode, found


def shell(*lines: str) -> list[str]:
    """Namespaces of its own, in which `lines` are done first."""
    return [*NAMESPACES, "sh", "-c", "\n".join(["set -e", *lines, 'exec "$@"']), "sh"]


def mounted(folder: Path, options: str) -> list[str]:
    """In a disk of its own, in main memory, at `folder`."""
    return shell(f"mount -t tmpfs -o {options} none {folder}", f"cd {folder}")


@in_namespaces
@with_torch
def test_a_healthy_machine_has_no_trouble(tmp_path):
    """In a network of its own, where nobody else has the usual ports."""
    code, found = doctor(tmp_path, inside=shell("ip link set lo up"))
    unwell = {subject: each for subject, each in found.items() if each["verdict"] != "ok" and not each["outlook"]}
    unwell.pop("copies", None)  # a clone beside an installation is one, rightly
    if unwell and unwell.keys() <= {"cores", "memory", "shared memory", "disk", "disk speed", "host name", "GPU"}:
        pytest.skip(f"this machine is not healthy: {unwell}")
    assert unwell == {} and code == 0
    assert found["will: train in one process"]["verdict"] == found["will: ranks on CPUs"]["verdict"] == "ok"


def named(found: Findings, subject: str, fact: str, remedy: str, verdict: str = "note") -> None:
    each = found[subject]
    assert (each["verdict"], fact in each["fact"], remedy in each["remedy"]) == (verdict, True, True), each


@in_namespaces
def test_a_disk_without_space(tmp_path):
    code, found = doctor(
        tmp_path, "--quick", inside=shell(f"mount -t tmpfs -o size=64k none {tmp_path}", f"cd {tmp_path}")
    )
    named(found, "disk", "No space left on device", "remove old runs", "no")
    assert code == 1 and found["will: train in one process"]["verdict"] == "no"


@in_namespaces
def test_a_disk_without_inodes(tmp_path):
    _, found = doctor(
        tmp_path, "--quick", inside=shell(f"mount -t tmpfs -o nr_inodes=50 none {tmp_path}", f"cd {tmp_path}")
    )
    named(found, "inodes", "of 50 names of files are left", "small files", "no")


@in_namespaces
def test_a_folder_that_is_mounted_read_only(tmp_path):
    _, found = doctor(tmp_path, "--quick", inside=mounted(tmp_path, "ro"))
    named(found, "disk", "mounted read-only", "set `folder`", "no")


SLOW_SYNC = "import os, time\nsync = os.fsync\ndef slow(file):\n    time.sleep(0.15)\n    sync(file)\nos.fsync = slow\n"


def broken_torch(folder: Path, line: str) -> Path:
    """A folder whose torch does not load."""
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "__init__.py").write_text(line)
    return folder


def test_a_slow_disk_faked(tmp_path):
    place = broken_torch(tmp_path / "path", "raise ImportError('not looked at here')")
    (place / "sitecustomize.py").write_text(SLOW_SYNC)
    _, found = doctor(tmp_path, first=place)
    named(found, "disk speed", "a checkpoint of 1 GB takes", "faster disk")


@pytest.mark.skipif(not can(["strace", "-e", "trace=none", "true"]), reason="strace delays the system's answer")
@pytest.mark.matrix
def test_a_slow_disk(tmp_path):
    place = broken_torch(tmp_path / "path", "raise ImportError('not looked at here')")
    slow = ["strace", "-qq", "-o", "/dev/null", "-e", "trace=fsync", "-e", "inject=fsync:delay_exit=150000"]
    _, found = doctor(tmp_path, first=place, inside=slow)
    named(found, "disk speed", "a checkpoint of 1 GB takes", "faster disk")


@in_namespaces
def test_a_port_that_is_taken(tmp_path):
    listen = "import socket, time; s = socket.create_server(('127.0.0.1', 7700)); open('up', 'w'); time.sleep(30)"
    inside = shell(
        "ip link set lo up",
        f'{sys.executable} -c "{listen}" & listener=$!',
        "while [ ! -e up ]; do sleep 0.05; done",
        '"$@" & doctor=$!; wait $doctor; code=$?; kill $listener; exit $code',
    )
    _, found = doctor(tmp_path, "--quick", inside=inside)
    named(found, "port 7700", "python", "Is it running already?")
    assert "(process " in found["port 7700"]["fact"] and "(feed)" in found["port 7700"]["fact"]


@in_namespaces
def test_a_host_without_loopback(tmp_path):
    code, found = doctor(tmp_path, "--quick", inside=[*NAMESPACES])
    named(found, "loopback", "no port of 127.0.0.1 answers", "ip link set lo up", "no")
    assert code == 1 and found["will: feed other hosts"]["verdict"] in ("no", "off")


def distribution(folder: Path, name: str, version: str, *needs: str) -> None:
    place = folder / f"{name}-{version}.dist-info"
    place.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {n}" for n in needs)]
    (place / "METADATA").write_text("\n".join(lines) + "\n")


def test_a_version_below_the_bound(tmp_path):
    distribution(tmp_path / "path", "numpy", "1.20.3")
    code, found = doctor(tmp_path, "--quick", first=tmp_path / "path")
    named(found, "versions", "numpy is 1.20.3, and trainfleet", 'pip install -U "numpy>=1.26"', "no")
    assert code == 1


def test_a_missing_extra(tmp_path):
    distribution(tmp_path / "path", "trainfleet", "0.1.0", "numpy>=1.26", 'no-such-thing>=2; extra == "monitor"')
    code, found = doctor(tmp_path, "--quick", first=tmp_path / "path")
    named(found, "will: TensorBoard, pictures", "no-such-thing missing", 'pip install "trainfleet[monitor]"', "off")
    assert code == 0, "nobody needs all extras"


@pytest.mark.parametrize(
    ("line", "fact"),
    [
        ("raise ImportError('libcudart.so.13: cannot open shared object file')", "libcudart.so.13"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV"),
        ("raise SystemExit(7)", "exit code 7"),
    ],
)
def test_a_torch_that_does_not_load(tmp_path, line, fact):
    code, found = doctor(tmp_path, first=broken_torch(tmp_path / "path", line))
    named(found, "torch", fact, "--force-reinstall", "no")
    assert code == 1 and found["will: ranks on CPUs"]["verdict"] == "no"


CLOCKS = {
    "stands before the installation": ("real() - 9e8", "was made on"),
    "is unlike that of the disk": ("real() + 3600", "ahead of that of the disk"),
    "jumps": ("real() + next(jumps)", "jumped by"),
}


@pytest.mark.parametrize("how", CLOCKS)
def test_a_wall_clock_faked_that(tmp_path, how):
    expression, fact = CLOCKS[how]
    lines = "import itertools, time\nreal = time.time\njumps = itertools.count(0, 5)\n"
    (tmp_path / "sitecustomize.py").write_text(f"{lines}time.time = lambda: {expression}\n")
    _, found = doctor(tmp_path, "--quick", first=tmp_path)
    assert found["clock"]["verdict"] != "ok" and fact in found["clock"]["fact"] and "chrony" in found["clock"]["remedy"]


def test_too_few_open_files(tmp_path):
    few = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, 512))  # noqa: E731
    _, found = doctor(tmp_path, "--quick", before=few)
    named(found, "open files", "at most 256 a process (could be 512)", "ulimit -n 512")


def test_too_few_processes(tmp_path):
    few = lambda: resource.setrlimit(resource.RLIMIT_NPROC, (300, 300))  # noqa: E731
    if os.geteuid() != 0:
        pytest.skip("whoever is not root would be kept from starting it")
    _, found = doctor(tmp_path, "--quick", before=few)
    named(found, "processes", "at most 300", "ulimit -u")


def test_more_threads_than_cores(tmp_path):
    _, found = doctor(tmp_path, "--quick", OMP_NUM_THREADS="512")
    named(found, "threads", "OMP_NUM_THREADS=512 asks each process for 512 threads", "unset OMP_NUM_THREADS")


def quota_of_half_a_core() -> Path | None:
    """A control group of version 2 or 1 that is ours to make."""
    for root, name, text in (("", "cpu.max", "50000 100000"), ("cpu", "cpu.cfs_quota_us", "50000")):
        above = Path("/sys/fs/cgroup") / root
        group = above / f"trainfleet-doctor-{os.getpid()}"
        if not (above / "cgroup.procs").exists():
            continue
        try:
            group.mkdir()
            (group / name).write_text(text)
            return group
        except OSError:
            if group.is_dir():
                group.rmdir()
    return None


def test_a_container_with_half_a_core(tmp_path):
    group = quota_of_half_a_core()
    if group is None:
        pytest.skip("control groups are not ours to make")
    try:
        _, found = doctor(tmp_path, "--quick", before=lambda: (group / "cgroup.procs").write_text(str(os.getpid())))
    finally:
        group.rmdir()
    named(found, "cores", "may use the time of 0.5", "OMP_NUM_THREADS=1")


@with_torch
def test_a_collective_that_fails(tmp_path):
    code, found = doctor(tmp_path, GLOO_SOCKET_IFNAME="nonsense")
    named(found, "gloo x 2", "Unable to find address for: nonsense", "GLOO_SOCKET_IFNAME", "no")
    named(found, "interface", "GLOO_SOCKET_IFNAME names nonsense", "unset GLOO_SOCKET_IFNAME", "no")
    assert code == 1 and found["will: ranks on CPUs"]["verdict"] == "no"
    assert found["will: train in one process"]["verdict"] == "ok"


def test_two_copies_of_the_package(tmp_path):
    shutil.copytree(PACKAGE / "trainfleet", tmp_path / "trainfleet", ignore=shutil.ignore_patterns("__pycache__"))
    _, found = doctor(tmp_path, "--quick", first=tmp_path)
    named(found, "copies", f"{tmp_path / 'trainfleet'} wins over {PACKAGE / 'trainfleet'}", "PYTHONPATH")


def test_variables_of_a_rank_in_the_shell(tmp_path):
    _, found = doctor(tmp_path, "--quick", RANK="1", WORLD_SIZE="4")
    named(found, "variables", "RANK=1, WORLD_SIZE=4 in this shell", "unset RANK WORLD_SIZE")


# troubles of runs


def advice(folder: Path, capsys) -> list[dict[str, Any]]:
    """What `trainfleet doctor RUN` finds beside where the run is, in order."""
    with pytest.raises(SystemExit) as told:
        main(["doctor", str(folder), "--json"])
    found = [each for each in json.loads(capsys.readouterr().out) if each["subject"] not in ("run", "time")]
    assert told.value.code == int(any(each["verdict"] == "no" for each in found))
    return found


def phases(**seconds: float) -> Callable[[int], dict[str, Any]]:
    return lambda number: {"phases": {**HEALTHY, **seconds}}


def slow_rank() -> list[Any]:
    slow, waits = {**HEALTHY, "backward": 0.5}, {**HEALTHY, "communication": 0.42}
    of_ten = [{phase: 10 * seconds for phase, seconds in each.items()} for each in (slow, waits, waits)]
    events = [started(world_size=3)]
    for number in range(1, 401):
        events.append(step(number, phases=slow))
        if number % 10 == 0:
            events.append(report(number, *of_ten))
    return [*events, ended()]


def failed(number: int) -> list[Any]:
    save = CheckpointFailed(step=400, reason="No space left on device.")
    return [started(), *healthy_events(), save, ended(number, "Rank 1 of 2 on node-1 failed.")]


RUNS: dict[str, tuple[Callable[[], list[Any]], str, str, str]] = {
    "data": (lambda: [started(), *healthy_events(phases(data=0.4)), ended()], "data", "68%", "data.workers=4 (now 2)"),
    "communication": (
        lambda: [started(), *healthy_events(phases(communication=0.4)), ended()],
        "communication",
        "70%",
        "batch.micro_batch=8",
    ),
    "evaluation": (
        lambda: [started(), *healthy_events(phases(evaluation=0.1)), ended()],
        "evaluation",
        "34%",
        "train.evaluate_every=681 (now 100)",
    ),
    "slow rank": (slow_rank, "slow rank", "rank 0 on node-0 (cpu) works 3.3 times", "trainfleet doctor"),
    "nan": (
        lambda: [started(), *healthy_events(lambda n: {"loss": math.nan} if n > 300 else {}), ended()],
        "not finite",
        "from step 301 on",
        "train.rollback_every=100",
    ),
    "divergence": (
        lambda: [started(), *healthy_events(lambda n: {"loss": 2.0 + n * 0.02} if n > 200 else {}), ended()],
        "divergence",
        "and is 9.8",
        "optimizer.lr=0.001",
    ),
    "overfitting": (
        lambda: [
            started(),
            *(step(n) for n in range(1, 401)),
            *(Evaluated(step=50 * n, loss=2.0 + 0.2 * abs(n - 3)) for n in range(1, 9)),
            ended(),
        ],
        "overfitting",
        "best at step 150",
        "train.early_stopping=3",
    ),
    "leak": (
        lambda: [started(), *healthy_events(lambda n: {"memory_bytes": 10**8 + n * 10**6}), ended()],
        "memory growth",
        "1 MB a step",
        ".item()",
    ),
    "killed": (lambda: [started(), *healthy_events()], "ended", "without a word after step 400", "same command again"),
    "failed": (lambda: failed(400), "ended", "Rank 1 of 2 on node-1 failed", "same command again"),
}


@pytest.mark.parametrize("trouble", RUNS)
def test_a_run_with_trouble(tmp_path, capsys, trouble):
    events, subject, fact, remedy = RUNS[trouble]
    first, *_ = advice(write_run(tmp_path / "run", events()), capsys)
    assert first["subject"] == subject, "what gains most comes first"
    assert fact in first["fact"] and remedy in first["remedy"], first


def test_a_healthy_run_has_no_trouble(tmp_path, capsys):
    assert advice(write_run(tmp_path / "run", [started(), *healthy_events(), ended()]), capsys) == []
