"""All rules about a run, in order of what there is to be gained."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path

from trainfleet.doctor.finding import Finding
from trainfleet.doctor.run import learning, safety, speed
from trainfleet.doctor.run.advice import Advice
from trainfleet.doctor.run.summary import Summary, summarize
from trainfleet.monitor.units import percentages, readable_duration, readable_rate


def examine_run(folder: Path) -> Iterator[Finding]:
    """Where the run is and where its time goes, then what limits it, the most first. ConfigError for no run."""
    run = summarize(folder.expanduser())
    yield _where(run)
    if run.warm:
        yield _time(run)
    yield from (each.finding for each in diagnose(run))


def diagnose(run: Summary) -> list[Advice]:
    """What the rules say, by gain; before enough steps were taken those about speed say nothing."""
    rules = [*safety.RULES, *learning.RULES]
    if len(run.warm) >= speed.FEWEST_STEPS:
        rules += speed.RULES
    found = [each for rule in rules for each in rule(run)]
    return sorted(found, key=lambda each: -each.gain)


def _where(run: Summary) -> Finding:
    of = f" of {run.planned:,}" if run.planned else ""
    if not run.steps:
        return Finding(
            subject="run", fact=f"no step is noted{of}", verdict="note", remedy="Has monitor.jsonl been off?"
        )
    how = "under way" if run.is_alive else "ended without a word" if run.ended is None else run.ended["reason"]
    starts = f", {run.starts} starts" if run.starts > 1 else ""
    ranks = f"{run.world_size} rank{'s' * (run.world_size > 1)} on {run.device}"
    return Finding(subject="run", fact=f"{run.last_step:,}{of} steps, {how}; {ranks}{starts}")


def _time(run: Summary) -> Finding:
    step = run.whole_seconds / len(run.warm)
    tokens = statistics.fmean(row.get("tokens", 0) for row in run.warm) / step if step else 0.0
    parts = percentages(run.phases)
    shares = ", ".join(f"{share}% {name}" for name, share in sorted(parts.items(), key=lambda part: -part[1]) if share)
    left = ""
    if run.is_alive and run.planned and run.planned > run.last_step:
        left = f", {readable_duration((run.planned - run.last_step) * step)} to go"
    return Finding(subject="time", fact=f"{step:.3g} s a step, {readable_rate(tokens)} tokens/s{left}: {shares}")
