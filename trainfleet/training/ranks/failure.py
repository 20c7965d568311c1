"""How a failing rank tells what happened, and how the launcher finds the cause among all that failed.

A rank leaves its report in a private folder of its agent. When one rank fails the others follow, because a
peer is gone or because they are stopped; the cause is the first failure that is not such a consequence.
"""

from __future__ import annotations

import json
import re
import signal
import socket
import sysconfig
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from trainfleet.comm.environment import RankEnvironment
from trainfleet.errors import FailedTwice, PeerError, RankFailed, TrainfleetError

REPORT = "failure.txt"
INTERRUPTED = 130  # what shells report after Ctrl-C
UNGUARDED = 97  # of a rank that came upon launch() while it read the script that has started it
MEND = "Mend the cause, then give the same command again: it goes on from the newest checkpoint."
_STEP = "_trainfleet_step"
_FROM_OUTSIDE = ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP")


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """What one rank, or its launcher, says of its failure."""

    rank: int
    world_size: int
    host: str
    time: float
    """Seconds since the epoch, by that host's clock."""
    sentence: str
    """What happened, with the line where it did."""
    exit_code: int
    hint: str | None = None
    traceback: str = ""
    step: int | None = None
    """Steps that the run had taken, where the rank knew."""
    consequence: bool = False
    """True where the rank fell because another had: its peer was gone, or it was stopped."""
    from_outside: bool = False
    """True where a signal ended it that others send: that says nothing of how another start will fare."""
    is_second: bool = False
    """True where the start before met the same."""

    def error(self) -> RankFailed:
        """The error for whoever started the ranks; its exit code is that of the cause where that had one."""
        kind = FailedTwice if self.is_second else RankFailed
        error = kind(f"Rank {self.rank} of {self.world_size} on {self.host} {self.sentence}", hint=self.hint)
        if not self.is_second:
            error.exit_code = self.exit_code  # type: ignore[misc]
        if self.traceback:
            error.__cause__ = RankTraceback(self.traceback)
        return error

    def is_like(self, other: Failure) -> bool:
        """Whether this is the same error at the same step: a further start would meet it again."""
        return (self.step, _without_addresses(self.sentence)) == (other.step, _without_addresses(other.sentence))

    def as_repeated(self) -> Failure:
        """This failure, told as the second of its kind."""
        at = "at the start" if self.step is None else f"after step {self.step}"
        return replace(
            self,
            sentence=f"failed twice in the same way {at}, so it was not started again: it {self.sentence}",
            hint=" ".join([*([self.hint] if self.hint else []), MEND]),
            is_second=True,
        )


class RankTraceback(Exception):
    """The traceback of a rank, as text: the cause that `--debug` prints."""

    def __str__(self) -> str:
        return f"on the rank:\n{self.args[0]}"


@contextmanager
def reported_failures() -> Iterator[None]:
    """In a rank that `launch` or `run_elastic` started: leave a report of what is raised, and exit with its code.

    The launcher prints it; in any other process the error passes through.
    """
    environment = RankEnvironment.from_env()
    if environment.launcher != "trainfleet" or environment.error_file is None:
        yield
        return
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    except Exception as exc:
        failure = describe(exc, environment)
        tell_launcher(failure, environment)
        raise SystemExit(failure.exit_code) from None


def tell_launcher(failure: Failure, environment: RankEnvironment) -> bool:
    """Leave the report where the launcher of this rank finds it; False where none of ours started it."""
    if environment.launcher != "trainfleet" or environment.error_file is None:
        return False
    _path(Path(environment.error_file).parent).write_text(json.dumps(asdict(failure)))
    return True


def describe(exc: Exception, environment: RankEnvironment) -> Failure:
    """What `exc` means to a person who sees only this."""
    own = isinstance(exc, TrainfleetError)
    text = str(exc) if own else f"{type(exc).__name__}: {exc}"
    return Failure(
        rank=environment.rank,
        world_size=environment.world_size,
        host=socket.gethostname(),
        time=time.time(),
        sentence=f"failed at {_line(exc)}: {text}",
        exit_code=exc.exit_code if isinstance(exc, TrainfleetError) else RankFailed.exit_code,
        hint=exc.hint if isinstance(exc, TrainfleetError) else None,
        traceback="".join(traceback.format_exception(type(exc), exc, exc.__traceback__)),
        step=getattr(exc, _STEP, None),
        consequence=isinstance(exc, PeerError),
    )


def note_step(exc: BaseException, step: int) -> None:
    """Let `exc` carry how many steps the run had taken, for the report."""
    with suppress(AttributeError):  # an exception with slots
        setattr(exc, _STEP, step)


def leave_report(folder: Path, error: RankFailed, cause: BaseException | None = None) -> Path | None:
    """Write what is known of the failure of a run into its folder, for whoever comes later; None where that fails."""
    path = folder / REPORT
    below = "".join(traceback.format_exception(cause)) if cause else str(error.__cause__ or "")
    lines = [time.strftime("%Y-%m-%d %H:%M:%S%z"), str(error), error.hint or "", below]
    try:
        path.write_text("\n".join(line for line in lines if line) + "\n", encoding="utf-8")
    except OSError:
        return None
    return path


def read_failures(folder: Path) -> list[Failure]:
    """The reports that ranks left below `folder`."""
    return [failure_from_json(path.read_text()) for path in folder.rglob(_path(Path()).name)]


def failure_from_json(text: str) -> Failure:
    return Failure(**json.loads(text))


def death_of(rank: int, world_size: int, exit_code: int, *, stopped: bool, step: int | None = None) -> Failure:
    """A rank that ended without a report. `stopped` says that its launcher may have done it."""
    name = None
    if exit_code < 0:
        name = signal.Signals(-exit_code).name
        sentence = f"was killed by {name}."
        hint = {
            "SIGKILL": "The system may have run out of memory (look at `dmesg`), or somebody ended it.",
            "SIGSEGV": "A native library crashed; run with PYTHONFAULTHANDLER=1 to see where.",
        }.get(name)
    elif exit_code == UNGUARDED:
        sentence = "read the script to find the function, and came upon launch() again."
        hint = 'Put the call of launch() under `if __name__ == "__main__":`.'
    else:
        sentence, hint = f"ended with exit code {exit_code} and left no report.", "Look at its output above."
    return Failure(
        rank=rank,
        world_size=world_size,
        host=socket.gethostname(),
        time=time.time(),
        sentence=sentence,
        exit_code=RankFailed.exit_code,
        hint=hint,
        step=step,
        consequence=stopped,
        from_outside=name in _FROM_OUTSIDE,
    )


def cause_of(failures: Iterable[Failure]) -> Failure:
    """The first that is not a consequence of another; the first of all where every one is."""
    return min(failures, key=lambda failure: (failure.consequence, failure.time))


def _without_addresses(sentence: str) -> str:
    return re.sub(r"0x[0-9a-f]+", "0x", sentence)


def _path(folder: Path) -> Path:
    return folder / "failure.json"


def _line(exc: BaseException) -> str:
    return line_of(traceback.extract_tb(exc.__traceback__))


def line_of(frames: Sequence[traceback.FrameSummary]) -> str:
    """Where it happened: the innermost line of the user's own code, else of ours, else of anyone's."""
    package = str(Path(__file__).parents[1])
    libraries = tuple({sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib")})
    users = [f for f in frames if not f.filename.startswith((*libraries, package, "<frozen"))]
    ours = [f for f in frames if f.filename.startswith(package)]
    for found in (users, ours, list(frames)):
        if found:
            frame: Any = found[-1]
            return f"{frame.filename}:{frame.lineno} in {frame.name}"
    return "an unknown line"
