"""A run in which something is killed or cut again and again, and what became of its samples and weights."""

from __future__ import annotations

import json
import multiprocessing
import random
import secrets
import socket
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults import parts

from trainfleet.net.credentials import Credentials
from trainfleet.net.link import Link
from trainfleet.net.relay import Relay

KINDS = ("feeder", "trainer", "relay", "cut", "half_open", "slow")
DEADLINE = 90.0
"""Seconds without a step after which a run counts as hung."""
PROGRESS = 3
"""Steps after a fault that count as gone on."""


@dataclass
class Outcome:
    """What came of a run with faults, beside the run that had none."""

    faults: Counter[str] = field(default_factory=Counter)
    resumed: list[tuple[str, float]] = field(default_factory=list)
    """Each fault, and the seconds from it to the next step."""
    steps: int = 0
    lost: int = 0
    """Uses of samples that are missing: each is used once an epoch, over the steps that the weights are made of."""
    doubled: int = 0
    """Uses beyond that."""
    same_order: bool = False
    same_weights: bool = False
    seconds: float = 0.0


def run_with_faults(
    folder: Path, *, faults: int, seed: int, peer: bool = False, seconds_a_sample: float = 0.004
) -> Outcome:
    """Three feeders, one behind a link that breaks and one behind a relay, and a trainer with checkpoints.

    With `peer` it is a plain socket peer instead: one feeder, behind the link.
    """
    steps = 20 * faults
    plain, faulty = folder / "plain", folder / "faulty"
    for place in (plain, faulty):
        place.mkdir(parents=True)
    _ended_well(_start(parts.train, str(plain), None, None, steps))
    with ExitStack() as closing:
        run = (_PeerRun if peer else _Run)(faulty, steps, seconds_a_sample, closing)
        outcome = run.break_often(faults, random.Random(seed))
    _compare(outcome, plain, faulty, steps)
    return outcome


class _Run:
    """The processes of a run, each started again after it was killed."""

    kinds: tuple[str, ...] = KINDS

    def __init__(self, folder: Path, steps: int, seconds: float, closing: ExitStack) -> None:
        self._folder = folder
        linked, direct, self._relay_place = (f"127.0.0.1:{_free_port()}" for _ in range(3))
        self._link = closing.enter_context(Link(linked))
        host, port = self._link.address
        self._starts = self._parts(linked, direct, f"{host}:{port}", steps, seconds, closing)
        self._feeders = [name for name in self._starts if name != "trainer"]
        self._running = {name: start() for name, start in self._starts.items()}
        closing.callback(self._end)

    def _parts(
        self, linked: str, direct: str, link: str, steps: int, seconds: float, closing: ExitStack
    ) -> dict[str, Callable[[], Any]]:
        secret, keys = secrets.token_bytes(32), str(self._folder / "feeder")
        self._relay_keys = Credentials.make(folder=self._folder / "relay")
        self._open_relay()
        closing.callback(lambda: self._relay.close())
        relay = self._relay.token()
        addresses = [link, direct, str(Credentials.make(folder=Path(keys)).token(via=relay))]
        return {
            "linked feeder": lambda: _start(parts.feed, linked, None, secret, None, seconds),
            "direct feeder": lambda: _start(parts.feed, direct, None, secret, None, seconds),
            "relayed feeder": lambda: _start(parts.feed, None, str(relay), None, keys, seconds),
            "trainer": lambda: _start(parts.train, str(self._folder), addresses, secret, steps),
        }

    def break_often(self, faults: int, rng: random.Random) -> Outcome:
        outcome, begun = Outcome(), time.monotonic()
        self._await(0, PROGRESS)
        for number in range(faults):
            kind = self.kinds[number % len(self.kinds)]
            before, at = self._line(), time.monotonic()
            mend = self._break(kind, rng)
            time.sleep(rng.uniform(0.0, 0.3))
            mend()
            if not self._await(before, 1):
                break
            outcome.resumed.append((kind, time.monotonic() - at))
            outcome.faults[kind] += 1
            self._await(before, PROGRESS)
        self._link.restore()
        while not self._is_done():
            self._await(self._line(), 1)
        _ended_well(self._running.pop("trainer"))
        outcome.seconds = time.monotonic() - begun
        return outcome

    def _break(self, kind: str, rng: random.Random) -> Callable[[], None]:
        """Have something fail; what mends it."""
        if kind == "feeder":
            return self._kill(rng.choice(self._feeders))
        if kind == "trainer":
            return self._kill("trainer")
        if kind == "relay":
            self._relay.close()
            return self._open_relay
        {"cut": self._link.cut, "half_open": self._link.half_open, "slow": self._link.pause}[kind]()
        return self._link.restore

    def _kill(self, name: str) -> Callable[[], None]:
        process = self._running[name]
        process.kill()
        process.join(10)

        def again() -> None:
            self._running[name] = self._starts[name]()

        return again

    def _open_relay(self) -> None:
        self._relay = Relay(self._relay_place, credentials=self._relay_keys)

    # what the trainer notes

    def _line(self) -> int:
        """Steps noted so far, those after a resume again."""
        with suppress(FileNotFoundError):
            return (self._folder / "used.jsonl").read_bytes().count(b"\n")
        return 0

    def _is_done(self) -> bool:
        return self._running["trainer"].exitcode == 0

    def _await(self, before: int, more: int) -> bool:
        """Until so many more steps were noted; False if the run came to its end."""
        until = time.monotonic() + DEADLINE
        while self._line() < before + more:
            if self._is_done():
                return False
            code = self._running["trainer"].exitcode
            if code is not None:
                raise RuntimeError(f"the trainer ended with exit code {code}")
            if time.monotonic() > until:
                raise TimeoutError(f"no step within {DEADLINE:g} s")
            time.sleep(0.01)
        return True

    def _end(self) -> None:
        for process in self._running.values():
            process.kill()
            process.join(10)


class _PeerRun(_Run):
    kinds = tuple(kind for kind in KINDS if kind != "relay")

    def _parts(
        self, linked: str, direct: str, link: str, steps: int, seconds: float, closing: ExitStack
    ) -> dict[str, Callable[[], Any]]:
        return {
            "feeder": lambda: _start(parts.feed_as_peer, linked, seconds),
            "trainer": lambda: _start(parts.train, str(self._folder), [f"peer {link}"], None, steps),
        }


def _compare(outcome: Outcome, plain: Path, faulty: Path, steps: int) -> None:
    """Fill in what the two runs used and came to. Of a step that was taken again, the last time counts: that is the
    one that the weights are made of."""
    import torch

    wanted, used = _used(plain), _used(faulty)
    outcome.steps = len(used)
    uses = Counter(index for indices in used.values() for index in indices)
    least, rest = divmod(steps * parts.SIZE, parts.SAMPLES)
    outcome.lost = sum(max(0, least - uses[index]) for index in range(parts.SAMPLES))
    outcome.doubled = sum(max(0, uses[index] - least - (rest > 0)) for index in range(parts.SAMPLES))
    outcome.same_order = used == wanted
    one, other = (torch.load(place / "weights.pt", weights_only=True) for place in (plain, faulty))
    outcome.same_weights = all(torch.equal(one[name], other[name]) for name in one) and one.keys() == other.keys()


def _used(folder: Path) -> dict[int, list[int]]:
    lines = [json.loads(line) for line in (folder / "used.jsonl").read_text().splitlines() if line.endswith("}")]
    return {line["step"]: line["used"] for line in lines}


def _start(target: Callable[..., None], *args: Any) -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "trainfleet.training.trainer", "trainfleet.data.feed"])
    process = context.Process(target=target, args=args)
    process.start()
    return process


def _ended_well(process: Any) -> None:
    process.join(DEADLINE)
    if process.exitcode != 0:
        process.kill()
        raise RuntimeError(f"a run ended with exit code {process.exitcode}")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
