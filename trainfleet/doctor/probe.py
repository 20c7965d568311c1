"""Try something in processes of its own: with a deadline, and none of them left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

# Should the parent be killed, each process ends itself: the alarm is set before anything can hang.
_ALARM = "import signal; hasattr(signal, 'alarm') and signal.alarm({seconds})\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class Tried:
    """How one process ended."""

    returncode: int | None
    """None: it was still running at the deadline, or when a peer of it had failed, and was killed."""
    output: str
    error: str
    """The last line of stderr: the sentence of its exception."""


def try_programs(programs: Sequence[str], *, deadline: timedelta) -> list[Tried]:
    """Run Python programs side by side; those that are late, or whose peer failed, are killed."""
    with trying(programs, deadline=deadline) as results:
        return results()


@contextmanager
def trying(programs: Sequence[str], *, deadline: timedelta) -> Iterator[Callable[[], list[Tried]]]:
    """Start Python programs side by side, and give what waits for them: the caller does something else meanwhile.

    The deadline counts from here. None of them is left when this ends, also of those that nobody waited for.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        outputs = [(folder / f"{i}.out", folder / f"{i}.err") for i in range(len(programs))]
        processes: list[subprocess.Popen[bytes]] = []
        until = time.monotonic() + deadline.total_seconds()

        def results() -> list[Tried]:
            codes = _wait(processes, until)
            for process in processes:
                _kill(process)
            texts = [(out.read_text(errors="replace"), err.read_text(errors="replace")) for out, err in outputs]
            return [
                Tried(returncode=code, output=out, error=(err.strip().splitlines() or [""])[-1])
                for code, (out, err) in zip(codes, texts)
            ]

        try:
            for program, (out, err) in zip(programs, outputs):
                alarm = _ALARM.format(seconds=int(deadline.total_seconds()) + 1)
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-c", alarm + program],
                        stdin=subprocess.DEVNULL,
                        stdout=stack.enter_context(out.open("wb")),
                        stderr=stack.enter_context(err.open("wb")),
                        start_new_session=True,
                    )
                )
            yield results
        finally:
            for process in processes:
                _kill(process)


def _wait(processes: list[subprocess.Popen[bytes]], until: float) -> list[int | None]:
    while True:
        codes = [process.poll() for process in processes]
        if None not in codes or any(codes) or time.monotonic() > until:
            return codes
        time.sleep(0.02)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """The process, if it still runs, with whatever it has started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
