"""Classic silent bugs, planted one at a time: what verify says of each, and of the same plans without a bug.

Nothing of these raises an error, and the loss falls with each of them. A bug is found at the right tensor where the
first one to differ is the first that the bug changes.
"""

from __future__ import annotations

import argparse
import functools
import re
from pathlib import Path
from typing import Any

from measuring.table import RESULTS, Report, Table
from proof.bugs import BUGS, Bug
from proof.models import case_of
from proof.running import degrees, work_of

from trainfleet import launch
from trainfleet.plan import Plan
from trainfleet.training.proof.case import Case
from trainfleet.training.proof.trace import trace_rank
from trainfleet.training.proof.verdict import Trace, Verdict


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only to see that it runs")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--only", default="", help="bugs whose name has this in it")
    options = parser.parse_args()
    numbers = [number for number, bug in enumerate(BUGS) if options.only in bug.name][: 2 if options.quick else None]
    rows: list[list[str | float | None]] = []
    found_right = false_alarms = 0
    clean: dict[tuple[str, Plan], Verdict] = {}
    for number in numbers:
        bug = BUGS[number]
        verdict = verdict_with(bug, number)
        first = verdict.first.tensor if verdict.first is not None else "nothing"
        is_right = re.match(bug.at, first) is not None
        found_right += is_right
        key = (bug.model, bug.plan)
        if key not in clean:
            clean[key] = verdict_with(bug, None)
            false_alarms += not clean[key].holds
        deviation = f"{verdict.first.deviation:.1e}" if verdict.first is not None else None
        said = "" if is_right else f" (NOT at {bug.at})"
        rows.append(
            [bug.name, f"{bug.model}, {bug.plan}", first + said, deviation, "holds" if clean[key].holds else "?"]
        )
        print(rows[-1], flush=True)
    report = Report(name="injected_bugs", summary=str(__doc__))
    report.add(
        Table(
            title="What verify says first",
            columns=["bug", "plan", "first tensor to differ", "by", "without the bug"],
            rows=rows,
            notes=[
                f"{found_right} of {len(numbers)} bugs are found at the right tensor; {false_alarms} false alarms in "
                f"{len(clean)} plans without a bug (benchmarks/parity.py holds many more)."
            ],
        )
    )
    report.write(options.results)


def verdict_with(bug: Bug, number: int | None) -> Verdict:
    """Of the bug's plan, with it planted, or without."""
    size = degrees(bug.plan)
    case, plan, reference = work_of(of_model(bug.model), bug.plan, size)
    return reference.verdict(launch(_run, size, (number, case, plan, reference.ties)))


@functools.cache
def of_model(name: str) -> Case:
    return case_of(name)


def _run(number: int | None, *work: Any) -> Trace:
    if number is not None:
        BUGS[number].plant()
    return trace_rank(*work)


if __name__ == "__main__":
    main()
