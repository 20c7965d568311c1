"""Families of models under tensor parallelism, pipeline, context parallelism and ZeRO-3, beside one process.

Small configurations with random weights, three steps of AdamW. A number is the largest deviation of a tensor, as a
part of what rounding explains; what cannot be is refused with its reason. docs/parallelism.md says what is compared.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from measuring.table import RESULTS, Report, Table
from proof.families import FAMILIES, case_of
from proof.nets import NETS
from proof.running import degrees, held_against_one_process, spread

from trainfleet.plan import Plan
from trainfleet.training.proof.verdict import Verdict

PLANS = {
    "zero=3": spread(zero=3, dp_shard=2),
    "tp=2": spread(tp=2),
    "pp=2": spread(pp=2),
    "cp=2": spread(cp=2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only to see that it runs")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--only", nargs="*", help="families by name")
    options = parser.parse_args()
    chosen = options.only or (["llama", "forces"] if options.quick else [*FAMILIES, *NETS])
    rows: list[list[str | float | None]] = []
    reasons: dict[str, int] = {}
    counts = {"held": 0, "refused": 0, "wrong": 0}
    for family in chosen:
        found = results(family)
        rows.append([family, *(cell(found[plan], reasons, counts) for plan in PLANS)])
        print(rows[-1], *(each for each in found.values() if not isinstance(each, Verdict)), sep="\n  ", flush=True)
    notes = [
        f"{counts['held']} cells compute what one process computes, {counts['refused']} are refused, "
        f"{counts['wrong']} do not hold.",
        *(f"({number}) {reason}" for reason, number in reasons.items()),
    ]
    report = Report(name="families", summary=str(__doc__))
    report.add(Table(title="Two processes", columns=["family", *PLANS], rows=rows, notes=["\n\n".join(notes)]))
    report.write(options.results)


def results(family: str) -> dict[str, Verdict | str]:
    plans: list[Plan] = list(PLANS.values())
    return dict(zip(PLANS, held_against_one_process(case_of(family), plans, degrees(plans[0]))))


def cell(verdict: Verdict | str, reasons: dict[str, int], counts: dict[str, int]) -> str:
    if isinstance(verdict, str):
        counts["refused" if verdict.startswith("refused") else "wrong"] += 1
        reason = verdict.replace(f"{Path(__file__).parents[1]}/", "")
        return f"{verdict.split(':')[0]} ({reasons.setdefault(reason, len(reasons) + 1)})"
    counts["held" if verdict.holds else "wrong"] += 1
    return (
        f"{verdict.largest.deviation / verdict.largest.tolerance:.3f}" if verdict.holds else f"DIFFERS: {verdict.first}"
    )


if __name__ == "__main__":
    main()
