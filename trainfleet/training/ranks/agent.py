"""Torch's elastic agent, one a host: starts the ranks of a run here, watches them, and ends them all together.

What is added to it: A second Ctrl-C kills. The ranks die with the agent, even when it is killed. Ranks that fail
twice in the same way at the same step are not started a third time; others are, at once or after a pause
(restarts.py). And when ranks fail, the agents of all hosts agree on the cause before they report it.
"""

from __future__ import annotations

import json
import logging
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import (
    DefaultLogsSpecs,
    LogsSpecs,
    MultiprocessContext,
    PContext,
    SignalException,
)
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from trainfleet.comm.environment import RUN_ID
from trainfleet.errors import PeerError
from trainfleet.training.ranks.failure import Failure, cause_of, death_of, failure_from_json, read_failures
from trainfleet.training.ranks.processes import LEFT_BEHIND_SECONDS, RankProcesses, environments
from trainfleet.training.ranks.progress import read_progress
from trainfleet.training.ranks.restarts import NotAgain, Restarts

if TYPE_CHECKING:
    from types import FrameType

    from trainfleet.training.ranks.copies import Preloaded

logger = logging.getLogger(__name__)

Make = Callable[[dict[int, dict[str, str]], LogsSpecs], PContext]
"""Makes, but does not start, the processes of the ranks of this host, from their environments by local rank."""

_ROLE = "trainfleet"


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What the agents of a run have to know of it."""

    nproc: int
    """Ranks on this host."""
    nnodes: int = 1
    endpoint: str = "localhost:0"
    """Where the agents meet."""
    is_host: bool = True
    """Whether this host listens there."""
    address: str = "127.0.0.1"
    """How the other hosts call this one."""
    max_restarts: int = 0
    timeout: timedelta = timedelta(minutes=10)
    """For the agents to meet."""
    grace: timedelta = timedelta(minutes=1)
    """For ranks that were told to end: to save and to say goodbye."""


def run_command(job: Job, command: Sequence[str], *, threads: int | None, preloaded: Preloaded | None = None) -> int:
    """Run `command` as each rank of this host until all have ended; RankFailed names the cause if one failed.

    Where it is `python -m module ...`, ranks are copies of `preloaded`. 0, or 128 + the number of the signal that
    ended them.
    """

    def make(environments: dict[int, dict[str, str]], logs: LogsSpecs) -> PContext:
        return RankProcesses(command, environments, logs, threads=threads, preloaded=preloaded)

    ended = _run(job, make)
    return 128 + ended if isinstance(ended, signal.Signals) else 0


def run_function(job: Job, function: Callable[..., Any], args: Sequence[Any], *, start_method: str) -> list[Any]:
    """What `function(*args)` returns on each rank of this host; KeyboardInterrupt if a signal ended them."""

    def make(environments: dict[int, dict[str, str]], logs: LogsSpecs) -> PContext:
        arguments = dict.fromkeys(environments, tuple(args))
        return MultiprocessContext(_ROLE, function, arguments, environments, start_method, logs)

    ended = _run(job, make)
    if isinstance(ended, signal.Signals):
        raise KeyboardInterrupt(f"The ranks were ended by {ended.name}.")
    return [ended[rank] for rank in sorted(ended)]


def _run(job: Job, make: Make) -> dict[int, Any] | signal.Signals:
    with tempfile.TemporaryDirectory(prefix="trainfleet-") as folder, _signals_restored(), _quiet():
        ended = _supervise(job, make, Path(folder))
    if isinstance(ended, Failure):
        # Raised only here: a traceback that somebody keeps would keep the agent, and with it its open port.
        raise ended.error()
    return ended


def _supervise(job: Job, make: Make, folder: Path) -> dict[int, Any] | Failure | signal.Signals:
    """Start the ranks of this host and stay until they have ended: with results, with a failure, or by a signal."""
    seconds = max(1, round(job.timeout.total_seconds()))
    parameters = RendezvousParameters(
        backend="c10d",
        endpoint=job.endpoint,
        run_id=RUN_ID,
        min_nodes=job.nnodes,
        max_nodes=job.nnodes,
        local_addr=job.address,
        is_host=job.is_host,
        join_timeout=seconds,
        read_timeout=seconds,
    )
    try:
        handler = get_rendezvous_handler(parameters)
        spec = WorkerSpec(
            role=_ROLE,
            local_world_size=job.nproc,
            entrypoint=_ROLE,  # which is for torch's log alone: `make` knows what is run
            rdzv_handler=handler,
            max_restarts=job.max_restarts,
            monitor_interval=0.1,
            local_addr=job.address,
        )
        agent = _Agent(
            spec=spec,
            logs_specs=DefaultLogsSpecs(log_dir=str(folder)),
            shutdown_timeout=round(job.grace.total_seconds()),
        )
        agent.folder = folder
        agent._make = make
        agent._restarts = Restarts()
        try:
            result: RunResult | None = agent.run()
        finally:
            handler.shutdown()
        if result is None:  # the agent's word for it; it has logged why
            raise RendezvousError("another host has ended the run")
    except SignalException as exc:
        return exc.sigval
    except NotAgain as exc:
        return exc.failure
    except RendezvousError as exc:
        raise PeerError(
            f"The {job.nnodes} hosts of this run did not meet at {job.endpoint} within {seconds} s: {exc}",
            hint="Look at the other hosts: each has to start with the same --nnodes and rendezvous.",
        ) from exc
    return agent.cause(result) if result.is_failed() else dict(result.return_values)


class _Agent(LocalElasticAgent):
    folder: Path
    """Where ranks leave their reports."""
    _make: Make
    _restarts: Restarts
    _died: dict[int, int] = {}  # noqa: RUF012  # local rank -> exit code, of those that were seen to fall first
    _result: RunResult | None = None

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self._end_those_left()
        self._result = super()._monitor_workers(worker_group)
        return self._result

    def _end_those_left(self) -> None:
        """Once a rank that is a function has failed, end the others: torch would give one that hangs half a minute."""
        processes = getattr(getattr(self._pcontext, "_pc", None), "processes", ())
        died = {rank: process.exitcode for rank, process in enumerate(processes) if process.exitcode}
        if died and not self._died:
            self._died = died
            self._shutdown(timeout=LEFT_BEHIND_SECONDS)

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        """Start anew, unless the ranks failed as they did before: then another start would do no better."""
        self._stop_workers(worker_group)
        failure = None
        if self._result is not None and self._result.is_failed():
            failure = cause_of(self._failures(self._result))
        progress = read_progress(self._attempt())
        pause = self._restarts.after(
            failure if failure is not None and not failure.consequence else None,
            took_steps=progress is not None and progress[0] < progress[1],
        )
        if failure is not None:
            level = logging.INFO if failure.consequence else logging.WARNING
            soon = f"in {pause:g} s" if pause else "now"
            logger.log(level, "The ranks start anew %s, because rank %d %s", soon, failure.rank, failure.sentence)
        time.sleep(pause)
        worker_group.state = WorkerState.STOPPED
        self._initialize_workers(worker_group)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self._died, self._result = {}, None
        self._agree_on_restarts(worker_group)
        restarts = worker_group.spec.max_restarts - self._remaining_restarts
        self._pcontext = self._make(environments(worker_group, restarts), self._logs_specs)
        self._pcontext.start()
        return self._pcontext.pids()

    def _agree_on_restarts(self, worker_group: WorkerGroup) -> None:
        """Let the ranks of all hosts hear of equally many restarts: where they meet depends on that number.

        A host whose ranks failed counts one; another that only saw it come back would not.
        """
        size, store = worker_group.group_world_size or 1, worker_group.store
        if size == 1 or store is None:
            return
        most = worker_group.spec.max_restarts
        try:
            store.set(f"trainfleet/restarts/{worker_group.group_rank}", str(most - self._remaining_restarts))
            counted = [int(store.get(f"trainfleet/restarts/{host}")) for host in range(size)]
        except RuntimeError as exc:  # torch's word for a store that is gone, or has waited long enough
            raise RendezvousError(f"the hosts could not agree on the number of restarts ({exc})") from exc
        self._remaining_restarts = most - max(counted)

    def _stop_workers(self, worker_group: WorkerGroup, *args: Any, **kwargs: Any) -> None:
        # Ranks whose peer is gone end by themselves. Those that hang would be given half a minute.
        self._shutdown(timeout=LEFT_BEHIND_SECONDS)

    def _attempt(self) -> Path:
        """The folder of the latest start."""
        return max(self.folder.rglob("attempt_*"), key=lambda path: int(path.name.split("_")[1]))

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        try:
            super()._shutdown(death_sig, timeout)
        except SignalException:  # the second Ctrl-C, while the ranks save: the person has lost patience
            logger.warning("Told twice to end: the ranks are killed.")
            super()._shutdown(signal.SIGKILL, 5)

    def cause(self, result: RunResult) -> Failure:
        """Why the run failed, as far as this host knows and the others tell."""
        own = cause_of(self._failures(result))
        return cause_of([own, *self._causes_elsewhere(own)])

    def _failures(self, result: RunResult) -> list[Failure]:
        """What the ranks of this host have reported, and the deaths of those that could not."""
        workers = self.get_worker_group().workers
        failures = read_failures(self._attempt())
        reported = {failure.rank for failure in failures}
        progress = read_progress(self._attempt())
        step = progress[1] if progress else None
        first = min((failure.timestamp for failure in result.failures.values()), default=0)
        codes = {rank: (failed.exitcode, failed.timestamp > first + 1) for rank, failed in result.failures.items()}
        if self._died:  # what came after, we did ourselves
            codes = {workers[local].global_rank: (code, False) for local, code in self._died.items()}
        for rank, (code, late) in codes.items():
            if rank not in reported:
                # Once one rank has failed the agent stops the others: SIGTERM, and after a while SIGKILL.
                stopped = code == -signal.SIGTERM or late
                failures.append(death_of(rank, workers[0].world_size, code, stopped=stopped, step=step))
        return failures

    def _causes_elsewhere(self, own: Failure) -> Iterator[Failure]:
        """What the agents of other hosts hold for the cause; those that say nothing within three seconds do not count.

        Only this exchange tells a host whose ranks lost their peers why those went.
        """
        group = self.get_worker_group()
        store: Any = group.store
        others = [other for other in range(group.group_world_size or 1) if other != group.group_rank]
        if not others:
            return
        with suppress(RuntimeError):  # the host of the store may be the one that is gone
            store.set(f"trainfleet/cause/{group.group_rank}", json.dumps(asdict(own)))
            ends = time.monotonic() + 3
            while others and time.monotonic() < ends:
                for other in [o for o in others if store.check([f"trainfleet/cause/{o}"])]:
                    yield failure_from_json(store.get(f"trainfleet/cause/{other}").decode())
                    others.remove(other)
                time.sleep(0.05)


@contextmanager
def _signals_restored() -> Iterator[None]:
    """The agent takes these signals for itself and does not give them back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    taken = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    before: list[tuple[signal.Signals, Callable[[int, FrameType | None], Any] | int | None]] = [
        (each, signal.getsignal(each)) for each in taken
    ]
    try:
        yield
    finally:
        for each, handler in before:
            signal.signal(each, handler)


@contextmanager
def _quiet() -> Iterator[None]:
    """What torch's agent logs goes to our log, as debugging: a failure report must begin with the cause."""
    forward = _Forward()
    names = ("torch.distributed.elastic", "torchelastic-events-null", "torch.multiprocessing")
    loggers = [logging.getLogger(name) for name in names]
    before = [each.propagate for each in loggers]
    for each in loggers:
        each.propagate = False
        each.addHandler(forward)
    try:
        yield
    finally:
        for each, propagate in zip(loggers, before, strict=True):
            each.removeHandler(forward)
            each.propagate = propagate


class _Forward(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        logger.debug("%s: %s", record.name, record.getMessage())
