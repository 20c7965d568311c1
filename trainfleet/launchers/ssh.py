"""A run on a list of hosts: `trainfleet train` on each of them over the system's ssh, all or none."""

from __future__ import annotations

import json
import queue
import shlex
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from trainfleet.errors import LaunchError, PeerError, RankFailed
from trainfleet.launchers.command import Command
from trainfleet.launchers.hosts import Host
from trainfleet.launchers.preflight import Answer, check_answers
from trainfleet.launchers.probe import Probe
from trainfleet.launchers.signals import signals_to

SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=15", "-o", "ServerAliveInterval=15")
_LOST = 255  # of ssh itself: no connection, or none any more
_FIRST_WORDS_SECONDS = 5.0
"""For the others to end by themselves once one has failed; what they say then names the cause."""
_GRACE_SECONDS = 80.0
"""For a host that was told to end: its launcher gives its ranks a minute."""

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Far:
    """How things are on the hosts."""

    directory: str
    python: str
    first: str
    """Address of the first host, as the others call it."""
    port: int
    ssh: tuple[str, ...] = SSH
    connect_seconds: float = 60.0
    """For the probe of a host."""


def run_over_ssh(command: Command, hosts: Sequence[Host], far: Far, *, say: Say) -> int:
    """Probe the hosts, start the run on all, and stay until it has ended everywhere: 0, or the code of what failed.

    SIGINT or SIGTERM asks all hosts to save and end, a second one kills. No process stays behind.
    """
    for remark in probe_hosts(command, hosts, far):
        say(f"note: {remark}")
    ends = [_End(host, _far_command(command, number, far), far.ssh) for number, host in enumerate(hosts)]
    try:
        return _supervise(ends, say)
    finally:
        for end in ends:
            end.close()


def probe_hosts(command: Command, hosts: Sequence[Host], far: Far) -> list[str]:
    """Ask all hosts at once; LaunchError or PeerError says what is in the way, remarks what is only strange."""
    with ThreadPoolExecutor(max_workers=min(32, len(hosts))) as pool:
        answers = list(pool.map(lambda pair: _probe(command, pair[1], far, listens=pair[0] == 0), enumerate(hosts)))
    return check_answers(answers, first=far.first, port=far.port, recipe=command.recipe, directory=far.directory)


def _probe(command: Command, host: Host, far: Far, *, listens: bool) -> Answer:
    words = [far.python, "-m", "trainfleet.launchers.probe", far.first, str(far.port), command.recipe]
    asked = time.time()
    try:
        done = subprocess.run(
            [*far.ssh, host.target, _in_directory([*words, *(["--listens"] if listens else [])], far)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=far.connect_seconds,
        )
    except FileNotFoundError as exc:
        raise LaunchError(f"There is no {far.ssh[0]!r} here. Install an ssh client.") from exc
    except subprocess.TimeoutExpired as exc:
        raise LaunchError(f"{host.name} did not answer by ssh within {far.connect_seconds:g} s.") from exc
    said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:] or ["it said nothing"]
    if done.returncode == _LOST:
        raise LaunchError(
            f"ssh does not reach {host.name}: {said[0]}",
            hint=f"`ssh -o BatchMode=yes {host.target} true` has to succeed without asking for a password.",
        )
    try:
        lines = done.stdout.strip().splitlines()
        return Answer(host=host.name, probe=Probe(**json.loads(lines[-1])), asked=asked, answered=time.time())
    except (IndexError, ValueError, TypeError) as exc:
        raise LaunchError(
            f"{host.name} has no trainfleet in {far.python}, or cannot go to {far.directory}: {said[0]}",
            hint="--python names the interpreter on the hosts, --directory where the run starts.",
        ) from exc


def _far_command(command: Command, number: int, far: Far) -> str:
    words = command.arguments(node_rank=number, rendezvous=f"{far.first}:{far.port}")
    return _in_directory([far.python, "-m", "trainfleet.launchers.tether", "--", *words], far)


def _in_directory(words: Sequence[str], far: Far) -> str:
    return f"cd {shlex.quote(far.directory)} && exec {shlex.join(words)}"


class _End:
    """Our end of the run on one host."""

    def __init__(self, host: Host, far_command: str, ssh: tuple[str, ...]) -> None:
        self.host = host
        # A session of its own: Ctrl-C is ours to pass on, in the words of the tether.
        self.process = subprocess.Popen(
            [*ssh, host.target, far_command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.last = ""

    def lines(self) -> Iterator[str]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.last = line.decode("utf-8", "replace").rstrip("\r\n")
            yield self.last

    def say(self, word: str) -> None:
        """A word to the tether, if anyone still listens."""
        assert self.process.stdin is not None
        with suppress(OSError, ValueError):  # it has ended, which its exit code says
            self.process.stdin.write(f"{word}\n".encode())
            self.process.stdin.flush()

    def close(self) -> None:
        """Let go of the tether, and of ssh."""
        if self.process.poll() is None:
            self.say("kill")
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.process.kill()
        assert self.process.stdin is not None and self.process.stdout is not None
        with suppress(OSError):
            self.process.stdin.close()
        self.process.wait()


def _supervise(ends: Sequence[_End], say: Say) -> int:
    """Pass on what the hosts say, until all have ended; once one has failed, the others are told to end."""
    heard: queue.SimpleQueue[tuple[_End | None, str | None]] = queue.SimpleQueue()

    def listen(end: _End) -> None:
        for line in end.lines():
            heard.put((end, line))
        end.process.wait()
        heard.put((end, None))

    for end in ends:
        threading.Thread(target=listen, args=(end,), daemon=True, name=f"ssh {end.host.name}").start()
    width = max(len(end.host.name) for end in ends)
    going, stopping = set(ends), _Stopping()
    with signals_to(lambda: heard.put((None, None))):
        while going:
            try:
                source, line = heard.get(timeout=stopping.act(going))
            except queue.Empty:
                continue
            if source is None:
                stopping.interrupted()
            elif line is not None:
                say(f"[{source.host.name:{width}}] {line}")
            else:
                going.remove(source)
                if source.process.returncode:
                    stopping.note(source)
    return stopping.code()


class _Stopping:
    """When the hosts are told to end, and when they are killed."""

    def __init__(self) -> None:
        self._first: _End | None = None
        self._interrupts = 0
        self._next: list[tuple[float, str]] = []

    def note(self, end: _End) -> None:
        """A host has failed: the others have a moment to see why, and to say so."""
        if self._first is None:
            self._first = end
            if not self._interrupts:
                now = time.monotonic()
                begin = now + _FIRST_WORDS_SECONDS
                self._next = [(begin, "end"), (begin + _GRACE_SECONDS, "kill")]

    def interrupted(self) -> None:
        self._interrupts += 1
        now = time.monotonic()
        self._next = [(now, "end"), (now + _GRACE_SECONDS, "kill")] if self._interrupts == 1 else [(now, "kill")]

    def act(self, going: set[_End]) -> float:
        """Say what is due to those that still run; seconds until there is more to say."""
        while self._next and self._next[0][0] <= time.monotonic():
            _, word = self._next.pop(0)
            for end in going:
                end.say(word)
                if word == "kill":
                    end.process.terminate()  # also an ssh that no longer gets through
        return max(0.01, self._next[0][0] - time.monotonic()) if self._next else 3600.0

    def code(self) -> int:
        """0 where all ended well; the code of the interruption; or raise what the first failure was."""
        if self._interrupts:
            return 130
        if self._first is None:
            return 0
        host, code = self._first.host.name, self._first.process.returncode
        if code == _LOST:
            raise PeerError(
                f"The connection to {host} was lost: {self._first.last or 'ssh said nothing'}",
                hint="The run has been ended everywhere. The same command goes on from the newest checkpoint.",
            )
        error = RankFailed(f"The run failed on {host} with exit code {code}; what it said is above.")
        error.exit_code = code  # type: ignore[misc]
        raise error
