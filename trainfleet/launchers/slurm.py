"""A run under SLURM: the file for `sbatch`, one task a node, which saves and queues again before its time is over."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from trainfleet.errors import LaunchError
from trainfleet.launchers.command import Command

_TIME = re.compile(
    r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?$"
)  # the six forms of sbatch's --time


@dataclass(frozen=True, kw_only=True, slots=True)
class Allocation:
    """What is asked of SLURM beside the nodes."""

    time: str
    """As sbatch has it: minutes, hours:minutes:seconds, days-hours, and so on."""
    name: str = "trainfleet"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    gpus_per_node: int | None = None
    cpus_per_node: int | None = None
    """Cores for all ranks of a node together; None: one a rank."""
    memory: str | None = None
    """Of a node, such as 64G."""
    output: str = "slurm-%j.out"
    end_seconds: int = 180
    """How long before its time is over the run is told to save and to end."""
    options: tuple[str, ...] = ()
    """Further ones of sbatch, such as `--constraint=a100`."""
    before: tuple[str, ...] = ()
    """Lines of the script before the run starts, such as `module load cuda`."""

    def __post_init__(self) -> None:
        seconds = seconds_of(self.time)
        if self.end_seconds < 30:
            raise LaunchError(f"end_seconds is {self.end_seconds}; a save needs 30 seconds or more.")
        if seconds <= self.end_seconds:
            raise LaunchError(
                f"The time is {self.time} ({seconds} s), and the run would be told to end {self.end_seconds} s before "
                "that. Ask for more time, or for a later end."
            )
        for option in self.options:
            if not re.match(r"--[a-z][a-z0-9-]*(=\S.*)?$", option):
                raise LaunchError(f"The option of sbatch {option!r} is not of the form --name=value.")
        for name in ("name", "partition", "account", "qos", "memory", "output"):
            value = getattr(self, name)
            if value is not None and (not value.strip() or re.search(r"\s", value)):
                raise LaunchError(f"{name} is {value!r}; a directive of sbatch ends at a space. Leave spaces out.")


def seconds_of(time: str) -> int:
    """Seconds of a time as sbatch has it; LaunchError where it has no such form."""
    match = _TIME.match(time)
    if match is None:
        raise LaunchError(f"The time is {time!r}; write minutes, hours:minutes:seconds or days-hours:minutes:seconds.")
    numbers = [int(number) for number in match.group("first", "second", "third") if number is not None]
    if match["days"] is not None:
        hours, minutes, seconds = (*numbers, 0, 0)[:3]
        return ((int(match["days"]) * 24 + hours) * 60 + minutes) * 60 + seconds
    if len(numbers) < 3:  # minutes[:seconds]
        minutes, seconds = (*numbers, 0)[:2]
        return minutes * 60 + seconds
    return (numbers[0] * 60 + numbers[1]) * 60 + numbers[2]


def sbatch_script(command: Command, allocation: Allocation, *, directory: str, python: str) -> str:
    """The whole file: what is asked of SLURM, then what is done on the first node of those that were given.

    `directory` is where the run starts, and `python` the interpreter that has trainfleet: both as the nodes see them.
    """
    directives = "\n".join(f"#SBATCH {line}" for line in _directives(command, allocation))
    words = command.arguments(node_rank=None, rendezvous="$first:$port")
    quoted = " ".join(f'"{word}"' if word == "$first:$port" else shlex.quote(word) for word in words)
    before = "".join(f"{line}\n" for line in allocation.before)
    return (
        _SCRIPT.replace("@DIRECTIVES@", directives)
        .replace("@DIRECTORY@", shlex.quote(directory))
        .replace("@BEFORE@", before)
        .replace("@PYTHON@", shlex.quote(python))
        .replace("@COMMAND@", quoted)
    )


def _directives(command: Command, allocation: Allocation) -> Iterator[str]:
    yield f"--job-name={allocation.name}"
    yield f"--nodes={command.nodes}"
    yield "--ntasks-per-node=1"
    asked = {
        "cpus-per-task": allocation.cpus_per_node or command.nproc_per_node,
        "gpus-per-node": allocation.gpus_per_node,
        "mem": allocation.memory,
        "partition": allocation.partition,
        "account": allocation.account,
        "qos": allocation.qos,
    }
    yield from (f"--{name}={value}" for name, value in asked.items() if value is not None)
    yield f"--time={allocation.time}"
    yield f"--signal=B:TERM@{allocation.end_seconds}"
    yield "--requeue"
    yield "--open-mode=append"
    yield f"--output={allocation.output}"
    yield from allocation.options


_SCRIPT = """#!/usr/bin/env bash
# Written by `trainfleet launch slurm`. Queue it with sbatch; end it for good, with a save, with
#     scancel --batch --signal=INT JOB
@DIRECTIVES@

set -u
cd @DIRECTORY@ || exit 1
@BEFORE@
# The nodes meet at the first of them. Two jobs that share it hardly ever share the port too.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000))
run=(@COMMAND@)
# A job that was queued again goes on where it stopped, even where the recipe says to begin.
if ((${SLURM_RESTART_COUNT:-0} > 0)); then run+=(--resume auto); fi

# One task a node, the launcher of that node's ranks, which starts them anew after a failure. It is told to end by a
# word on its standard input: a signal of SLURM's reaches every process of the step, also ranks that are saving.
words=$(mktemp -u "${TMPDIR:-/tmp}/trainfleet-$SLURM_JOB_ID.XXXXXX")
mkfifo -m 600 "$words" && exec 3<>"$words" 4<"$words" || exit 1
rm "$words"
# TERM comes before the time is over, and on preemption.
queue_again=no
trap 'queue_again=yes; echo end >&3' TERM
trap 'echo end >&3' INT
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK" # srun does not take it from the job since 22.05
srun --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=0 bash -c \\
    'exec "$0" -m trainfleet.launchers.tether -- "$@" --node-rank "$SLURM_NODEID"' @PYTHON@ "${run[@]}" \\
    <&4 3>&- 4<&- &
step=$!
exec 4<&-

while true; do
    wait "$step"
    code=$?
    kill -0 "$step" 2>/dev/null || break # a signal ends `wait`, not the step
done
if [ "$queue_again" = yes ] && [ "$code" -ne 0 ]; then
    echo "Told to end: saved, and queued again."
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""
