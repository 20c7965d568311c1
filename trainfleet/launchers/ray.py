"""A run on the machines of a Ray cluster: a placement group, and an actor a host that holds `trainfleet train`."""

from __future__ import annotations

import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainfleet.deps import require
from trainfleet.errors import LaunchError, PeerError, RankFailed
from trainfleet.launchers.command import Command
from trainfleet.launchers.preflight import Answer, check_answers
from trainfleet.launchers.probe import Probe, probe
from trainfleet.launchers.signals import signals_to

Say = Callable[[str], None]
_END_SECONDS = 5.0
"""For the others to end by themselves once one has failed."""

_SIGNAL = -1  # in place of the number of a host


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """Where the run goes, and what it takes there."""

    directory: str
    """Where it starts, on every host: a shared disk, or the same files."""
    address: str | None = None
    """Of the cluster; None: RAY_ADDRESS, else a cluster of this host alone."""
    cpus_per_rank: float = 1.0
    gpus_per_rank: float = 0.0
    wait_seconds: float = 120.0
    """For the cluster to have room."""


def run_on_ray(command: Command, cluster: Cluster, *, say: Say) -> int:
    """Place the hosts of the run, compare them, start it on all, and stay until it has ended: 0, or an error.

    Ctrl-C asks all hosts to save and end. A host whose actor is gone ends its ranks: they hang on its tether.
    """
    ray: Any = require("ray", "ray", purpose="`trainfleet launch ray`")
    started = not ray.is_initialized()
    if started:
        _connect(ray, cluster)
    group: Any = None
    try:
        group = _place(ray, command, cluster)
        return _run(ray, command, cluster, group, say)
    finally:
        if group is not None:
            ray.util.remove_placement_group(group)
        if started:
            ray.shutdown()


def _connect(ray: Any, cluster: Cluster) -> None:
    options: dict[str, Any] = {"log_to_driver": False, "configure_logging": False, "include_dashboard": False}
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    if address is not None:
        options = {"address": address, "log_to_driver": False}
    try:
        ray.init(**options)
    except (ConnectionError, ValueError, RuntimeError) as exc:
        raise LaunchError(
            f"There is no Ray cluster at {address or 'this host'}: {exc}",
            hint="`ray status` shows one; --address names it; without one Ray starts on this host alone.",
        ) from exc


def _place(ray: Any, command: Command, cluster: Cluster) -> Any:
    """A bundle a host, each on another machine."""
    bundle = {"CPU": command.nproc_per_node * cluster.cpus_per_rank}
    if cluster.gpus_per_rank:
        bundle["GPU"] = command.nproc_per_node * cluster.gpus_per_rank
    strategy = "STRICT_SPREAD" if command.nodes > 1 else "STRICT_PACK"
    group = ray.util.placement_group([bundle] * command.nodes, strategy=strategy)
    try:
        ray.get(group.ready(), timeout=cluster.wait_seconds)
    except ray.exceptions.GetTimeoutError as exc:
        ray.util.remove_placement_group(group)
        has = [
            {name: node["Resources"].get(name, 0) for name in bundle}
            for node in ray.nodes()
            if node.get("Alive", False)
        ]
        raise LaunchError(
            f"Ray has no room for {command.nodes} hosts with {bundle} each within {cluster.wait_seconds:g} s; its "
            f"machines have {has}.",
            hint="Ask for fewer processes a host, or for less of --cpus-per-rank and --gpus-per-rank, or wait longer.",
        ) from exc
    return group


def _run(ray: Any, command: Command, cluster: Cluster, group: Any, say: Say) -> int:
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    bundle = group.bundle_specs[0]
    actor = ray.remote(_Host)
    hosts = [
        actor.options(
            num_cpus=bundle["CPU"],
            num_gpus=bundle.get("GPU", 0),
            max_concurrency=3,  # lines flow while it is told to end
            max_restarts=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number),
        ).remote()
        for number in range(command.nodes)
    ]
    try:
        first, port = ray.get(hosts[0].place.remote(), timeout=cluster.wait_seconds)
        names = [f"host {number}" for number in range(command.nodes)]
        for remark in _compare(ray, hosts, names, first, port, command, cluster):
            say(f"note: {remark}")
        runs = [
            host.run.options(num_returns="streaming").remote(
                command.arguments(node_rank=number, rendezvous=f"{first}:{port}"),
                cluster.directory,
                os.environ.get("OMP_NUM_THREADS"),
            )
            for number, host in enumerate(hosts)
        ]
        return _supervise(ray, hosts, runs, names, say)
    finally:
        for host in hosts:
            ray.kill(host)


def _compare(
    ray: Any, hosts: Sequence[Any], names: Sequence[str], first: str, port: int, command: Command, cluster: Cluster
) -> list[str]:
    answers = []
    for number, host in enumerate(hosts):
        asked = time.time()
        found = ray.get(
            host.probe.remote(first, port, command.recipe, cluster.directory, number == 0), timeout=cluster.wait_seconds
        )
        said = Probe(**found)
        answers.append(Answer(host=f"{names[number]} ({said.hostname})", probe=said, asked=asked, answered=time.time()))
    return check_answers(answers, first=first, port=port, recipe=command.recipe, directory=cluster.directory)


def _supervise(ray: Any, hosts: Sequence[Any], runs: Sequence[Any], names: Sequence[str], say: Say) -> int:
    """Pass on what the hosts say, until all have ended; once one has failed, the others are told to end."""
    heard: queue.SimpleQueue[tuple[int, str | int | BaseException]] = queue.SimpleQueue()

    def listen(number: int) -> None:
        try:
            for reference in runs[number]:
                heard.put((number, ray.get(reference)))
        except Exception as exc:  # of Ray: the actor or its machine is gone
            heard.put((number, exc))

    for number in range(len(hosts)):
        threading.Thread(target=listen, args=(number,), daemon=True, name=names[number]).start()
    going = set(range(len(hosts)))
    failed: tuple[int, int | BaseException] | None = None
    interrupts, end_at = 0, float("inf")
    with signals_to(lambda: heard.put((_SIGNAL, ""))):
        while going and interrupts < 2:  # the second time, whoever asks has lost patience: the actors are killed
            try:
                number, word = heard.get(timeout=0.5)
            except queue.Empty:
                if time.monotonic() > end_at:
                    end_at = float("inf")
                    _tell_to_end(hosts, going)
                continue
            if number == _SIGNAL:
                interrupts += 1
                _tell_to_end(hosts, going)
            elif isinstance(word, str):
                say(f"[{names[number]}] {word}")
            else:
                going.discard(number)
                if word != 0 and failed is None:
                    failed = (number, word)
                    end_at = time.monotonic() + _END_SECONDS
    return _outcome(names, failed, interrupted=interrupts > 0)


def _tell_to_end(hosts: Sequence[Any], going: set[int]) -> None:
    for number in going:
        hosts[number].end.remote()


def _outcome(names: Sequence[str], failed: tuple[int, int | BaseException] | None, *, interrupted: bool) -> int:
    if interrupted:
        return 130
    if failed is None:
        return 0
    number, word = failed
    if isinstance(word, BaseException):
        raise PeerError(
            f"Ray has lost {names[number]}: {str(word).splitlines()[0] if str(word) else type(word).__name__}",
            hint="The run has been ended everywhere. The same command goes on from the newest checkpoint.",
        ) from word
    error = RankFailed(f"The run failed on {names[number]} with exit code {word}; what it said is above.")
    error.exit_code = word  # type: ignore[misc]
    raise error


class _Host:
    """The actor of one host. It holds the launcher there on a tether: when the actor goes, so do the ranks."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def place(self) -> tuple[str, int]:
        """Where the others find this host, and a port that is free here."""
        ray: Any = require("ray", "ray")
        with socket.socket() as trial:
            trial.bind(("", 0))
            return str(ray.util.get_node_ip_address()), int(trial.getsockname()[1])

    def probe(self, first: str, port: int, recipe: str, directory: str, listens: bool) -> Mapping[str, Any]:
        return asdict(probe(first, port, str(Path(directory) / recipe), listens=listens))

    def run(self, words: Sequence[str], directory: str, threads: str | None) -> Iterator[str | int]:
        """What the launcher says, line by line; at last its exit code."""
        # Ray sets the threads for this actor, which computes nothing; the launcher gives each rank its share.
        env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        if threads is not None:
            env["OMP_NUM_THREADS"] = threads
        self._process = subprocess.Popen(
            [sys.executable, "-m", "trainfleet.launchers.tether", "--", *words],
            cwd=directory,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert self._process.stdout is not None
        for line in self._process.stdout:
            yield line.decode("utf-8", "replace").rstrip("\r\n")
        yield self._process.wait()

    def end(self) -> None:
        """Ask the launcher to have its ranks save and end."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.write(b"end\n")
            self._process.stdin.flush()
