"""What a run loses time by: each rule names the phase, its share, and the setting to change."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator

from trainfleet.doctor.run.advice import Advice, Rule, advice
from trainfleet.doctor.run.summary import Summary
from trainfleet.monitor.history.ranks import Ranks

FEWEST_STEPS = 20
"""Before, shares of time say more about the start than about the run."""
SHORT_STEP_SECONDS = 0.01
STARVED, COMMUNICATING, EVALUATING, SAVING, OBSERVING, MOVING = 0.05, 0.25, 0.15, 0.05, 0.02, 0.1
"""Shares of a run's time from which on a phase is worth somebody's attention."""
SLOW_RANK = 1.2
"""Times the work of the median rank; below, ranks of a busy host differ by themselves."""
LOW_MFU = 0.3
"""Well-tuned runs of transformers reach 0.4 to 0.58 (57.8 % on one H200, 46 % on H100: KempnerForge, llm-foundry)."""
SLOWED = 1.5


def starved(run: Summary) -> Iterator[Advice]:
    """The loop waits for batches."""
    share = run.share("data")
    if share < STARVED:
        return
    waits = run.waits()
    cause = max(waits, key=lambda name: waits[name]) if any(waits.values()) else "data"
    workers, prefetch = int(run.setting("data.workers", 0)), int(run.setting("data.prefetch", 2))
    more = f"data.workers={max(2, 2 * workers)} (now {workers})"
    if workers and run.setting("data.prefetch") is not None:
        more += f", then data.prefetch={2 * prefetch}"
    fed = run.setting("data.source") == "remote"
    remedies = {
        "source": f"{more}; or put the data on faster storage",
        "transform": f"{more}; or do less in data.transform and __getitem__, or on the device: data.on_device",
        "network": "Keep samples as bytes and cast them here: data.on_device=pixels; then start more feeders, nearer",
        "data": more,
    }
    remedy = remedies.get(cause, more)
    if fed and cause != "network":
        remedy = "Start more feeders, or give them more --workers; and do less in their transform"
    what = {"data": "batches", "source": "reading samples", "transform": "transform and collate"}.get(cause, cause)
    fact = f"{_percent(share)} of the time is waiting for {what}: {_a_step(run, 'data')}"
    yield advice("data", fact, remedy, gain=share)


def communicates(run: Summary) -> Iterator[Advice]:
    """Ranks wait for each other's numbers; a rank that is slower than the others is `slow_rank`'s matter."""
    share = run.share("communication")
    if share < COMMUNICATING or run.world_size < 2 or any(slow_rank(run)):
        return
    micro, accumulation = run.batch()
    zero = int(run.setting("plan.zero", 0))
    turns = []
    if zero == 3:
        turns.append("plan.zero=2, if the parameters fit: stage 3 gathers them for each pass")
    if zero >= 2 and accumulation > 1:
        turns.append(
            f"batch.micro_batch={micro * accumulation} batch.accumulation=1, if it fits: stage {zero} "
            "exchanges gradients once a micro-batch"
        )
    if zero == 2:
        turns.append("plan.zero=1, if the gradients fit: they then travel once a step")
    if int(run.setting("plan.tp", 1)) > 1 or int(run.setting("plan.cp", 1)) > 1:
        turns.append("plan.tp and plan.cp no larger than the ranks of one host")
    elif zero < 2 and micro:
        turns.append(f"batch.micro_batch={2 * micro}, or batch.accumulation={2 * accumulation}: a larger global batch")
    if run.setting("plan.precision") == "fp32" and run.device.startswith("cuda"):
        turns.append("plan.precision=bf16")
    turns.append("a faster network (`trainfleet doctor` measures all_reduce on a host)")
    fact = f"{_percent(share)} of the time is waiting for other ranks: {_a_step(run, 'communication')}"
    yield advice("communication", fact, "; then ".join(turns), gain=share)


def evaluates(run: Summary) -> Iterator[Advice]:
    share = run.share("evaluation")
    if share < EVALUATING or len(run.evaluations) < 2:
        return
    every = run.setting("train.evaluate_every")
    seldom = f"train.evaluate_every={math.ceil(every * share / 0.05)}" if isinstance(every, int) else ""
    took = statistics.median(row.get("seconds", 0.0) for row in run.evaluations)
    fact = f"{_percent(share)} of the time is evaluation: {took:.3g} s each, {len(run.evaluations)} times"
    shorter = "train.evaluate_batches to fewer than now"
    yield advice("evaluation", fact, f"Set {seldom} (now {every}), or {shorter}" if seldom else shorter, gain=share)


def saves_stall(run: Summary) -> Iterator[Advice]:
    share = run.share("checkpoint")
    if share < SAVING or not run.saves:
        return
    blocked = statistics.median(row.get("seconds", 0.0) for row in run.saves)
    every = run.setting("checkpoint.every", 500)
    remedy = f"checkpoint.every={math.ceil(every * share / 0.01)} (now {every}); `trainfleet doctor` measures the disk"
    fact = f"{_percent(share)} of the time the loop waits for checkpoints: {blocked:.3g} s each"
    yield advice("checkpoints", fact, remedy, gain=share)


def slow_rank(run: Summary) -> Iterator[Advice]:
    """One rank works longer than the others at most reports, so that all wait for it."""
    named: Counter[int] = Counter()
    ranks = Ranks()
    for report in run.reports:
        alone = Ranks()
        for each in (alone, ranks):
            each.add(report["ranks"])
        if (slowest := alone.slowest) is not None:
            named[slowest.rank] += 1
    slow = ranks.slowest
    if slow is None or named[slow.rank] < max(2, 0.6 * named.total()) or slow.factor < SLOW_RANK:
        return
    remedies = {
        "data": "Look at the disk and the data.workers of that host",
        "transfer": "Look at pinned memory and the PCIe link of that GPU (nvidia-smi topo -m)",
        "checkpoint": "Look at the disk of that host",
    }
    default = "Look there for other programs (top), heat (nvidia-smi -q -d PERFORMANCE) and more threads than cores"
    more = slow.phase_seconds - slow.usual_seconds
    fact = (
        f"rank {slow.rank} on {slow.host or '?'} ({slow.device or '?'}) works {slow.factor:.1f} times as long "
        f"as the others, and all wait for it; most of it in {slow.phase} ({more:.3g} s more)"
    )
    remedy = f"{remedies.get(slow.phase, default)}; run `trainfleet doctor` there"
    whole = max(rank.seconds for rank in ranks.ranks) or 1.0
    yield advice("slow rank", fact, remedy, gain=min(1.0, slow.lost_seconds / whole))


def tiny_steps(run: Summary) -> Iterator[Advice]:
    """What a step costs besides its arithmetic is most of it."""
    overhead = run.share("other", "observers", "optimizer", "transfer")
    if not run.step_seconds < SHORT_STEP_SECONDS or overhead < 0.3:
        return
    micro, accumulation = run.batch()
    remedy = f"batch.micro_batch={max(2, 4 * micro)} (now {micro or 'unknown'}), with the learning rate that suits it"
    if accumulation > 1:
        remedy = f"batch.micro_batch={micro * accumulation} batch.accumulation=1: the same steps, in one piece"
    fact = f"a step takes {run.step_seconds * 1000:.1f} ms, and {_percent(overhead)} of that is not forward or backward"
    yield advice("small steps", fact, remedy, gain=overhead / 2)


def pieces_too_small(run: Summary) -> Iterator[Advice]:
    """A GPU computes many small micro-batches while most of its memory is empty; or recomputes what it could keep."""
    used, room = max((row.get("memory_bytes", 0) for row in run.steps), default=0), run.capacity_bytes
    if not run.device.startswith("cuda") or not room or not used or used > 0.5 * room:
        return
    micro, accumulation = run.batch()
    free = f"{used / 1e9:.1f} of {room / 1e9:.1f} GB of memory are used"
    if run.setting("plan.recompute", "none") != "none":
        fact = f"{free}, and still activations are computed twice (plan.recompute={run.setting('plan.recompute')})"
        yield advice("memory unused", fact, "plan.recompute=none", gain=0.25 * run.share("backward") or 0.2)
    if accumulation > 1 and micro:
        fact = f"{free}, while a step is {accumulation} micro-batches of {micro}"
        remedy = (
            f"batch.micro_batch={2 * micro} batch.accumulation={max(1, accumulation // 2)}: the same numbers, faster"
        )
        yield advice("memory unused", fact, remedy, gain=0.1)


def low_mfu(run: Summary) -> Iterator[Advice]:
    known = [row["mfu"] for row in run.warm if isinstance(row.get("mfu"), (int, float))]
    if not known or not run.device.startswith("cuda") or (mfu := statistics.median(known)) >= LOW_MFU:
        return
    turns = []
    if run.setting("plan.precision", "fp32") == "fp32":
        turns.append("plan.precision=bf16")
    if not run.setting("plan.compile", False):
        turns.append("plan.compile=true")
    micro, _ = run.batch()
    turns.append(f"batch.micro_batch={2 * micro}" if micro else "a larger batch.micro_batch")
    fact = f"{_percent(mfu)} of the GPUs' arithmetic is used; 40 to 55 % are usual for transformers"
    yield advice("low MFU", fact, ", then ".join(turns) + "; monitor.profile names the operators", gain=(0.4 - mfu) / 2)


def slowed_down(run: Summary) -> Iterator[Advice]:
    """The last fifth of the steps takes longer than the first."""
    count = len(run.warm) // 5
    if count < FEWEST_STEPS:
        return
    first, last = run.warm[:count], run.warm[-count:]
    before, now = (statistics.median(row["seconds"] for row in rows) for rows in (first, last))
    if now < SLOWED * before or now - before < 0.002:
        return
    grown = {
        phase: sum((r.get("phases") or {}).get(phase, 0.0) for r in last)
        - sum((r.get("phases") or {}).get(phase, 0.0) for r in first)
        for phase in {name for row in last for name in row.get("phases") or {}}
    }
    where = f", most of it in {max(grown, key=lambda name: grown[name])}" if grown else ""
    fact = f"steps have become slower: {before:.3g} s at first, {now:.3g} s now{where}"
    remedy = "Look for another program, heat, or a state of your own that grows; a start anew tells which it is"
    yield advice("slowing down", fact, remedy, gain=(now - before) / now)


def observers_cost(run: Summary) -> Iterator[Advice]:
    """What comes again and again; files that are written once, such as a profile's, are worth their time."""
    spent = sorted(float((row.get("phases") or {}).get("observers", 0.0)) for row in run.warm)
    share = sum(spent[: len(spent) - math.ceil(len(spent) / 50)]) / (run.whole_seconds or 1.0)
    if share < OBSERVING:
        return
    interval = int(run.setting("monitor.log_interval", 10))
    fact = f"{_percent(share)} of the time goes into writing what happens, every {interval} steps"
    factor = math.ceil(share / 0.005)
    remedy = f"monitor.log_interval={interval * factor} (now {interval}); observers of your own: train.observers"
    yield advice("observers", fact, remedy, gain=share)


def moves(run: Summary) -> Iterator[Advice]:
    share = run.share("transfer")
    if share < MOVING:
        return
    fact = f"{_percent(share)} of the time is bringing batches to the device: {_a_step(run, 'transfer')}"
    remedy = "Keep samples as bytes, and make floats of them there: data.on_device=pixels, or a function of yours"
    yield advice("transfer", fact, remedy, gain=share)


def _a_step(run: Summary, phase: str) -> str:
    own = run.phases.get(phase, 0.0) / max(1, len(run.warm))
    return f"{own:.3g} of {run.whole_seconds / max(1, len(run.warm)):.3g} s a step"


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%"


RULES: tuple[Rule, ...] = (
    starved,
    communicates,
    evaluates,
    saves_stall,
    slow_rank,
    tiny_steps,
    pieces_too_small,
    low_mfu,
    slowed_down,
    observers_cost,
    moves,
)
