"""Whether a run would survive: how it ended, its checkpoints, its restarts, its memory and its disk."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from itertools import pairwise

from trainfleet.doctor.run.advice import RESULT, Advice, Rule, advice
from trainfleet.doctor.run.summary import Summary
from trainfleet.monitor.units import readable_bytes, readable_duration

DAY = 86_400.0
SHORT_RUN_SECONDS = 600.0
"""A run that is done sooner loses less by a crash than by thinking about checkpoints."""
LEAST_SECONDS, LEAST_STEPS = 10.0, 10
"""Between two saves: each is written behind the loop, which it disturbs, and the next waits for it."""
NEARLY_FULL = 0.92
GROWN = 1.15
LOST = 0.03
"""Share of the run's time that restarts may cost before it is worth a word."""
_WELL = ("finished", "stopped early", "finished before")


def died(run: Summary) -> Iterator[Advice]:
    """A run that ended by an error, or without a word."""
    again = "Give the same command again: it goes on from the newest checkpoint"
    whole = [kept.step for kept in run.checkpoints if kept.problem is None]
    lost = run.last_step - max(whole) if whole else run.last_step
    again += (
        f" (step {max(whole)}; {lost} steps are taken again)" if whole else "; there is none, so from the beginning"
    )
    of = f" of {run.planned}" if run.planned else ""
    report = _first_lines(run.failure)
    if run.ended is None:
        if run.is_alive or not run.heard_at:
            return
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(run.heard_at))
        fact = f"it ended without a word after step {run.last_step}{of}, at {when}, as a process does that is killed"
        cause = f"{run.folder / 'failure.txt'} says: {report}" if report else "`dmesg` tells whether memory ran out"
        yield advice("ended", fact, f"{cause}. {again}.", gain=1.5 * RESULT, verdict="no")
    elif run.ended["reason"] == "interrupted":
        left = (run.planned or 0) - run.last_step
        if left > 0:
            yield advice("ended", f"it was interrupted after step {run.last_step}{of}", again + ".", gain=0.01)
    elif run.ended["reason"] not in _WELL:
        fact = f"it failed after step {run.ended.get('step', run.last_step)}{of}: {run.ended['reason'].rstrip('.')}"
        cause = f"{run.folder / 'failure.txt'} has the report. " if report else ""
        yield advice("ended", fact, f"{cause}Mend that. {again}.", gain=1.5 * RESULT, verdict="no")


def _first_lines(report: str) -> str:
    lines = [line.strip() for line in report.splitlines() if line.strip()]
    return lines[1].rstrip(".") if len(lines) > 1 else lines[0] if lines else ""


def restarts(run: Summary) -> Iterator[Advice]:
    """Time that went into steps which had to be taken again."""
    lost = sum(row["seconds"] + row.get("between_seconds", 0.0) for row in run.undone)
    kept = sum(row["seconds"] + row.get("between_seconds", 0.0) for row in run.steps)
    if (run.starts < 2 and not run.undone) or lost < LOST * (lost + kept):
        return
    share = lost / (lost + kept)
    fact = (
        f"{run.one_of * len(run.undone)} steps ({100 * share:.0f}% of the work) were lost in {run.starts - 1} restarts "
    )
    fact += f"and in rollbacks: goodput is {100 * (1 - share):.0f}%"
    every = run.setting("checkpoint.every")
    best = best_interval(run)
    remedy = "Find out why it restarts (failure.txt, the launcher's output)"
    if best is not None and isinstance(every, int) and best < every:
        remedy = f"checkpoint.every={best} (now {every}), and find out why it restarts"
    yield advice("restarts", fact, remedy, gain=share)


def interval_seconds(save: float, between_failures: float) -> float:
    """How long to compute between two saves that block for `save` seconds, to lose least time by both.

    W = sqrt(2 C M) (1 + sqrt(C / 2M) / 3 + C / 18M) - C, or M where C >= 2M: J. T. Daly, A higher order estimate of the
    optimum checkpoint interval for restart dumps, Future Generation Computer Systems 22 (2006); its first term is that
    of J. W. Young, Communications of the ACM 17 (1974).
    """
    if save >= 2 * between_failures:
        return between_failures
    ratio = save / (2 * between_failures)
    return math.sqrt(2 * save * between_failures) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save


def best_interval(run: Summary) -> int | None:
    """In steps; None where nothing was saved. Without a failure so far, one a day is expected."""
    if not run.saves or not run.warm:
        return None
    blocked = max(1e-3, statistics.median(row.get("seconds", 0.0) for row in run.saves))
    seconds = max(LEAST_SECONDS, interval_seconds(blocked, _between_failures(run)))
    return max(LEAST_STEPS, round(seconds / _seconds_a_step(run)))


def _between_failures(run: Summary) -> float:
    worked = sum(row["seconds"] + row.get("between_seconds", 0.0) for row in (*run.steps, *run.undone))
    return run.one_of * worked / (run.starts - 1) if run.starts > 1 else DAY


def _seconds_a_step(run: Summary) -> float:
    return run.whole_seconds / len(run.warm) or 1e-9


def saves_too_rare_or_often(run: Summary) -> Iterator[Advice]:
    """Against the interval of Young and Daly, where it is off by four times and costs more than a percent."""
    every, best = run.setting("checkpoint.every", 500 if run.recipe else None), best_interval(run)
    if best is None or not isinstance(every, int):
        return
    step, failures = _seconds_a_step(run), _between_failures(run)
    blocked = statistics.median(row.get("seconds", 0.0) for row in run.saves)
    known = "as so far" if run.starts > 1 else "assumed: none was seen"
    whole = (run.planned or run.last_step) * step
    if every > 4 * best and whole > SHORT_RUN_SECONDS:
        lost = every * step / 2 / failures
        fact = f"a failure loses {readable_duration(every * step / 2)} of work on average: a checkpoint each {every} "
        fact += f"steps, though one blocks for {blocked:.3g} s only"
    elif every < best / 4 and blocked / (every * step) > 0.01:
        lost = blocked / (every * step)
        fact = f"checkpoints block the loop for {100 * lost:.1f}% of the time: {blocked:.3g} s each {every} steps"
    else:
        return
    if lost < 0.01:
        return
    remedy = (
        f"checkpoint.every={best} (now {every}): least loss at a failure each {readable_duration(failures)} ({known};"
    )
    yield advice("checkpoints", fact, f"{remedy} Young and Daly's interval)", gain=min(1.0, lost))


def no_checkpoints(run: Summary) -> Iterator[Advice]:
    """None is written, none is whole, or the last could not be written."""
    if not run.steps:
        return
    every = run.setting("checkpoint.every")
    whole = [kept for kept in run.checkpoints if kept.problem is None]
    broken = [kept for kept in run.checkpoints if kept.problem is not None]
    taken = run.one_of * sum(row["seconds"] for row in run.steps)
    failed = [row for row in run.failed_saves if not run.saves or row["step"] > run.saves[-1]["step"]]
    if failed:
        fact = f"the checkpoint of step {failed[-1]['step']} could not be saved: {failed[-1]['reason'].rstrip('.')}"
        remedy = "Make room, or set checkpoint.folder to another disk; the next save tries again"
        yield advice("checkpoints", fact, remedy, gain=RESULT, verdict="no")
    elif "checkpoint" in run.recipe and every is None:
        if taken > SHORT_RUN_SECONDS:
            fact = f"none is written (checkpoint.every=null), and {readable_duration(taken)} of work would be lost"
            best = max(1, round(600 / max(1e-9, run.step_seconds)))
            yield advice("checkpoints", fact, f"checkpoint.every={best}: every ten minutes", gain=0.5)
    elif not whole and run.saves:
        fact = f"{len(run.saves)} were saved, but none of them is there and whole now"
        more = f": {broken[-1].problem}" if broken else ""
        remedy = f"trainfleet checkpoint verify {run.folder} reads every byte; look who cleans that folder"
        yield advice("checkpoints", fact + more, remedy, gain=RESULT, verdict="no")
    elif broken and not run.is_alive:
        names = ", ".join(str(kept.step) for kept in broken)
        fact = f"step{'s' * (len(broken) > 1)} {names} of {len(run.checkpoints)} cannot be used: {broken[-1].problem}"
        newest = max((kept.step for kept in whole), default=0)
        remedy = f"The newest whole one is of step {newest}, and a start goes on from there. "
        yield advice(
            "checkpoints", fact, remedy + f"trainfleet checkpoint verify {run.folder} reads every byte", gain=0.2
        )


def disk_fills(run: Summary) -> Iterator[Advice]:
    sizes = [kept.num_bytes for kept in run.checkpoints if kept.num_bytes]
    if not sizes or run.free_bytes is None or run.free_bytes > 2 * max(sizes):
        return
    fact = f"{readable_bytes(run.free_bytes)} are free, and a checkpoint is {readable_bytes(max(sizes))}"
    remedy = f"Make room; checkpoint.keep_last={max(1, int(run.setting('checkpoint.keep_last', 3)) - 1)} keeps fewer"
    yield advice("disk", fact, remedy, gain=RESULT if run.ended is None else 0.1)


def memory_nearly_full(run: Summary) -> Iterator[Advice]:
    used = max((row.get("memory_bytes", 0) for row in run.steps), default=0)
    if not run.capacity_bytes or used < NEARLY_FULL * run.capacity_bytes:
        return
    micro, accumulation = run.batch()
    turns = []
    if micro > 1:
        turns.append(f"batch.micro_batch={micro // 2} batch.accumulation={2 * accumulation}: the same numbers")
    if run.setting("plan.recompute", "none") == "none":
        turns.append("plan.recompute=blocks")
    if run.world_size > 1 and int(run.setting("plan.zero", 0)) < 3:
        turns.append(f"plan.zero={int(run.setting('plan.zero', 0)) + 1}")
    fact = f"a rank took {readable_bytes(used)} of the {readable_bytes(run.capacity_bytes)} that it has"
    yield advice("memory", fact, "; then ".join(turns) or "a smaller model, or more ranks", gain=0.6)


def memory_grows(run: Summary) -> Iterator[Advice]:
    """Each quarter of the run, without its first tenth, took more than the one before: a leak."""
    used = [row.get("memory_bytes", 0) for row in run.warm[len(run.warm) // 10 :]]
    size = len(used) // 4
    if size < 10:
        return
    quarters = [statistics.median(used[i * size : (i + 1) * size]) for i in range(4)]
    rises = [after - before for before, after in pairwise(quarters)]
    if quarters[0] <= 0 or quarters[3] < GROWN * quarters[0] or min(rises) < 0.3 * max(rises):
        return  # growth that fades is a cache that has filled
    a_step = (quarters[3] - quarters[0]) / (3 * size)
    fact = f"a rank's memory grew from {readable_bytes(quarters[0])} to {readable_bytes(quarters[3])}, "
    fact += f"{readable_bytes(a_step)} a step, and does not level off"
    gain = 0.3
    if run.capacity_bytes and a_step > 0:
        full = run.last_step + round((run.capacity_bytes - quarters[3]) / a_step)
        if full < (run.planned or full):
            fact += f"; it is full at step {full}"
            gain = RESULT
    remedy = "Look for lists of your own that keep tensors: losses without .item(), outputs in callbacks, caches of "
    yield advice("memory growth", fact, remedy + "a dataset (with data.workers=0 to tell)", gain=gain)


RULES: tuple[Rule, ...] = (
    died,
    restarts,
    saves_too_rare_or_often,
    no_checkpoints,
    disk_fills,
    memory_nearly_full,
    memory_grows,
)
