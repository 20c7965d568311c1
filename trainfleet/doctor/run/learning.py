"""Whether a run learns: what its losses, gradients and rates tell, each with the setting to change."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence

from trainfleet.doctor.run.advice import RESULT, Advice, Rule, advice
from trainfleet.doctor.run.summary import Row, Summary

WINDOW = 50
SPIKE_DEVIATIONS = 8.0
"""Robust ones: 1.4826 times the median absolute deviation is a standard deviation where noise is normal."""
FEW_SPIKES = 0.002
"""Share of steps: a spike in 500 steps is nothing to lose sleep over."""
DIVERGED = 1.15
OVERFIT = 1.03
_OWN_RULES = ("loss_not_finite", "gradient_not_finite", "loss_spike", "slow_rank", "data_starvation", "memory_growth")


def not_finite(run: Summary) -> Iterator[Advice]:
    """NaN or infinite losses among the steps that stand, or gradients while nothing skipped them."""
    bad = [row for row in run.steps if not math.isfinite(row["loss"])]
    if not bad:
        bad = [row for row in run.steps if not row.get("skipped") and _is_bad(row.get("grad_norm"))]
    validation = [row for row in run.evaluations if not math.isfinite(row["loss"])]
    if not bad and not validation:
        return
    first = (bad or validation)[0]
    seen = next((row for row in run.anomalies if "not_finite" in row["kind"]), None)
    what = "the loss" if not math.isfinite(first["loss"]) else "the gradient"
    if not bad:
        what = "the validation loss"
    where = f", first in {seen['module']}" if seen and seen.get("module") else ""
    last = bool(bad) and bad[-1] is run.steps[-1]
    fact = f"{what} is not finite from step {first['step']} on" if last else f"{what} was not finite at step "
    fact += "" if last else f"{first['step']} and at {len(bad or validation) - 1} more"
    turns = []
    if run.setting("train.rollback_every") is None:
        turns.append("train.rollback_every=100, which goes back by itself and leaves such batches out")
    if run.setting("train.clip_norm") is None:
        turns.append("train.clip_norm=1.0")
    if run.setting("plan.precision") == "fp16":
        turns.append("plan.precision=bf16")
    turns.append(f"optimizer.lr={_shown(run.setting('optimizer.lr', 3e-4) / 3)} (a third)")
    if not run.setting("schedule.warmup_steps", 0):
        turns.append("schedule.warmup_steps=100")
    before = [kept.step for kept in run.checkpoints if kept.problem is None and kept.step < first["step"]]
    back = f"Go on from the checkpoint of step {max(before)}: " if before and last else ""
    yield advice("not finite", fact + where, back + "; ".join(turns), gain=2 * RESULT, verdict="no" if last else "note")


def _is_bad(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def spikes(run: Summary) -> Iterator[Advice]:
    """Losses that jump out of the fifty before them, and come back."""
    found = spikes_in(run.steps)
    if not found or len(found) < max(2, FEW_SPIKES * len(run.steps)):
        return
    shown = ", ".join(str(row["step"]) for row in found[:5]) + (", ..." if len(found) > 5 else "")
    worst = max(row["loss"] for row in found)
    norms = [row["grad_norm"] for row in run.steps if isinstance(row.get("grad_norm"), float)]
    clip = run.setting("train.clip_norm")
    usual = statistics.median(norms) if norms else None
    turns = []
    if clip is None or (usual is not None and clip > 3 * usual):
        turns.append(f"train.clip_norm={_shown(2 * usual) if usual else 1.0} (now {clip})")
    if not run.setting("schedule.warmup_steps", 0):
        turns.append(f"schedule.warmup_steps={max(10, len(run.steps) // 50)} (now 0)")
    turns.append(f"optimizer.lr={_shown(run.setting('optimizer.lr', 3e-4) / 2)} (a half)")
    fact = f"the loss jumped at {len(found)} of {len(run.steps)} steps ({shown}), up to {worst:.4g}"
    yield advice("loss spikes", fact, "; then ".join(turns), gain=0.3)


def spikes_in(rows: Sequence[Row]) -> list[Row]:
    """Steps whose loss lies far above the median of the finite ones before; a plateau of high ones is none."""
    found: list[Row] = []
    window: list[float] = []
    for row in rows:
        loss = row["loss"]
        if len(window) >= WINDOW // 2:
            middle = statistics.median(window)
            spread = 1.4826 * statistics.median(abs(each - middle) for each in window)
            if math.isfinite(loss) and loss - middle > max(SPIKE_DEVIATIONS * spread, 0.2 * abs(middle)):
                found.append(row)
                continue
        if math.isfinite(loss):
            window = [*window[-(WINDOW - 1) :], loss]
    return found


def skipped_steps(run: Summary) -> Iterator[Advice]:
    """Overflows of fp16, after the scale has found its place."""
    settled = run.steps[WINDOW:]
    count = sum(bool(row.get("skipped")) for row in settled)
    if not settled or count < max(3, 0.01 * len(settled)):
        return
    share = count / len(settled)
    fact = f"{count} of the last {len(settled)} steps ({100 * share:.0f}%) changed nothing: gradients overflowed fp16"
    remedy = "plan.precision=bf16; or name what overflows in plan.float32_modules, or lower optimizer.lr"
    yield advice("skipped steps", fact, remedy, gain=share)


def never_warmed(run: Summary) -> Iterator[Advice]:
    """No warm-up, and a start that shows it: gradients far above what they are later, or a loss that first rises."""
    if run.setting("schedule.warmup_steps", 0) or len(run.steps) < 100 or run.steps[0]["step"] > 1:
        return
    start, later = run.steps[1:20], run.steps[50:]
    early = max((row["grad_norm"] for row in start if _finite(row.get("grad_norm"))), default=0.0)
    usual = statistics.median([row["grad_norm"] for row in later if _finite(row.get("grad_norm"))] or [math.inf])
    first, worst = run.steps[0]["loss"], max((row["loss"] for row in start if _finite(row["loss"])), default=0.0)
    rose = worst > 1.3 * first > 0
    if not rose and early < 30 * usual:
        return
    fact = f"the learning rate begins at its full height, and the loss rose from {first:.4g} to {worst:.4g} at first"
    if not rose:
        fact = "the learning rate begins at its full height, and gradients at first are "
        fact += f"{early / usual:.0f} times as large as later ({early:.3g})"
    steps = max(10, min(2000, (run.planned or len(run.steps)) // 50))
    yield advice("warm-up", fact, f"schedule.warmup_steps={steps} (now 0)", gain=0.15)


def diverges(run: Summary) -> Iterator[Advice]:
    """The loss has left its best and stays above it."""
    means = _windows(run)
    if len(means) < 8:
        return
    best = min(range(len(means)), key=means.__getitem__)
    low, last = means[best], means[-1]
    start = means[0]
    risen = last - low > 0.15 * max(abs(low), abs(start - low))
    if best > len(means) - 3 or not risen or min(means[-2:]) < low + 0.5 * (last - low):
        return
    at = run.steps[best * len(run.steps) // len(means)]["step"]
    kept = [each.step for each in run.checkpoints if each.problem is None and each.step <= at + len(run.steps) // 20]
    back = f"Go on from the checkpoint of step {max(kept)} with " if kept else "Start anew with "
    fact = f"the loss was {low:.4g} about step {at}, and is {last:.4g} now"
    remedy = f"{back}optimizer.lr={_shown(run.setting('optimizer.lr', 3e-4) / 3)} (a third)"
    if run.setting("train.clip_norm") is None:
        remedy += " and train.clip_norm=1.0"
    yield advice("divergence", fact, remedy, gain=RESULT, verdict="note")


def plateau(run: Summary) -> Iterator[Advice]:
    """The loss has stood still for two fifths of the run, at a rate that is still high."""
    means, rates = _windows(run), [row["learning_rate"] for row in run.steps]
    if len(means) < 10 or len(run.steps) < 200 or any(diverges(run)) or rates[-1] < 0.5 * max(rates):
        return
    split = len(means) * 3 // 5
    start, before, after = means[0], statistics.fmean(means[split - 2 : split + 1]), statistics.fmean(means[-3:])
    if start - before < 0.05 * abs(start) or before - after > 0.01 * (start - before):
        return
    at = run.steps[split * len(run.steps) // len(means)]["step"]
    fact = f"the loss stands at {after:.4g} since step {at}, while the learning rate is still {_shown(rates[-1])}"
    remedy = "schedule.name=cosine, which lowers the rate"
    if run.setting("schedule.name") != "constant":
        remedy = f"train.steps={run.last_step}, so that the rate falls earlier"
    yield advice("plateau", fact, f"{remedy}; or train.early_stopping=3; or a larger model", gain=0.4)


def overfits(run: Summary) -> Iterator[Advice]:
    """Validation was best some evaluations ago, and training got better since."""
    known = [row for row in run.evaluations if _finite(row["loss"])]
    if len(known) < 4:
        return
    best = min(range(len(known)), key=lambda index: known[index]["loss"])
    low, last = known[best], known[-1]
    if len(known) - 1 - best < 2 or last["loss"] - low["loss"] < (OVERFIT - 1) * abs(low["loss"]):
        return
    if (now := _mean_loss(run, last["step"])) >= (then := _mean_loss(run, low["step"])):
        return  # it is worse in training as well: that is divergence
    share = (last["step"] - low["step"]) / max(1, last["step"])
    fact = f"validation was best at step {low['step']} ({low['loss']:.4g}) and is {last['loss']:.4g} now, while the "
    fact += f"training loss fell from {then:.4g} to {now:.4g}: the model learns the samples by heart"
    remedy = "train.early_stopping=3 checkpoint.keep_best=1; then more data, or optimizer.args.weight_decay"
    yield advice("overfitting", fact, remedy, gain=share)


def skipped_samples(run: Summary) -> Iterator[Advice]:
    samples = sum(row.get("samples", 0) for row in run.steps)
    if not samples or run.skipped_samples < max(10, 0.01 * samples):
        return
    fact = f"{run.skipped_samples:,} samples could not be read and were left out, for {samples:,} that were used"
    remedy = "Look at `skip` lines of the output for an example; data.bad=raise stops at the first"
    yield advice("bad samples", fact, remedy, gain=0.05)


def anomalies(run: Summary) -> Iterator[Advice]:
    """What the run itself has seen, where no rule here looks for it."""
    counts = Counter(row["kind"] for row in run.anomalies if row["kind"] not in _OWN_RULES)
    for kind, count in counts.items():
        last = [row for row in run.anomalies if row["kind"] == kind][-1]
        fact = f"{count} time{'s' * (count > 1)}, last at step {last['step']}: {last['what']}"
        replay = (
            f"trainfleet replay {run.folder} --step {last['step']}" if last.get("path") else "docs/troubleshooting.md"
        )
        yield advice(kind.replace("_", " "), fact.rstrip("."), replay, gain=0.02)


def _windows(run: Summary) -> list[float]:
    """Mean losses of twenty equal stretches of the run; a loss that is not finite counts for nothing."""
    count = min(20, len(run.steps) // 10)
    means = []
    for window in range(count):
        rows = run.steps[window * len(run.steps) // count : (window + 1) * len(run.steps) // count]
        finite = [row["loss"] for row in rows if _finite(row["loss"])]
        if finite:
            means.append(statistics.median(finite))
    return means


def _mean_loss(run: Summary, step: int) -> float:
    """Of training about `step`."""
    near = [row["loss"] for row in run.steps if abs(row["step"] - step) <= 25 and _finite(row["loss"])]
    return statistics.fmean(near) if near else math.nan


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _shown(value: float) -> str:
    return f"{value:.2g}"


RULES: tuple[Rule, ...] = (
    not_finite,
    spikes,
    skipped_steps,
    never_warmed,
    diverges,
    plateau,
    overfits,
    skipped_samples,
    anomalies,
)
