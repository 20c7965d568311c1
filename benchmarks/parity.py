"""Every kind of plan beside one process: how far the tensors of two steps are off, for three models.

Compared are what every module gives in the first step, losses, gradients, their norm, and parameters after each step
of AdamW with clipping. A number is the largest deviation of a tensor, as a part of what rounding explains: below 1 the
plan computes what one process computes. Rounding explains 2e-5 of a tensor's norm in fp32 and 3e-2 in bf16, and three
times what a reference is off by that was rounded in another way.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from measuring.table import RESULTS, Report, Table
from proof.models import MODELS, case_of
from proof.running import degrees, held_against_one_process, spread

from trainfleet.plan import Plan
from trainfleet.training.proof.verdict import Verdict

SCHEDULES = ("gpipe", "1f1b", "interleaved_1f1b", "looped_bfs", "interleaved_zero_bubble", "zbv", "dualpipev")
QUICK = ("tp=2", "pp=2 1f1b")


def plans() -> dict[str, list[Plan]]:
    """By what they have in common."""
    data = [spread(dp_replicate=n) for n in (2, 4, 8)]
    data += [spread(zero=zero, dp_shard=n) for zero in (1, 2, 3) for n in (2, 4)]
    data += [spread(zero=zero, dp_shard=2, dp_replicate=2) for zero in (1, 2, 3)]
    alone = [*data, *(spread(tp=n) for n in (2, 4)), spread(tp=2, tp_vocabulary=True)]
    alone += [spread(tp=n, tp_sequence=True) for n in (2, 4)]
    alone += [spread(cp=n, cp_attention=kind) for n in (2, 4) for kind in ("ring", "all_to_all")]
    alone += [spread(pp=2, schedule=schedule) for schedule in SCHEDULES] + [spread(pp=4)]
    alone += [spread(dp_replicate=2, ep=2), spread(dp_replicate=4, ep=2), spread(dp_replicate=4, ep=4)]
    axes = [{"tp": 2}, {"cp": 2}, {"pp": 2}]
    zero = [{"dp_replicate": 2}, *({"zero": stage, "dp_shard": 2} for stage in (1, 2, 3))]
    two = [spread(**axis, **stage) for axis in axes for stage in zero]
    two += [spread(tp=2, pp=2, schedule=schedule) for schedule in SCHEDULES]
    two += [spread(tp=2, cp=2, cp_attention=kind) for kind in ("ring", "all_to_all")]
    two += [spread(cp=4, zero=2, dp_shard=2), spread(tp=4, pp=2)]
    two += [spread(cp=2, pp=2, schedule=schedule) for schedule in SCHEDULES]
    two += [spread(cp=2, pp=2, cp_attention="all_to_all"), spread(cp=2, ep=2), spread(dp_replicate=2, ep=2, pp=2)]
    two += [
        spread(tp=2, tp_vocabulary=True, **stage)
        for stage in (*zero, {"cp": 2}, {"pp": 2}, {"pp": 2, "schedule": "zbv"})
    ]
    two += [spread(tp=2, tp_sequence=True, **stage) for stage in zero]
    three = [spread(tp=2, pp=2, **stage) for stage in zero]
    three += [spread(tp=2, cp=2, **stage) for stage in (zero[0], zero[-1])]
    three += [spread(tp=2, zero=3, dp_shard=2, dp_replicate=2)]
    three += [spread(cp=2, pp=2, **stage) for stage in (zero[0], zero[-1])]
    three += [spread(cp=2, pp=2, ep=2), spread(zero=3, dp_shard=2, ep=2, pp=2, tp=2)]
    narrow = [spread(precision="bf16", recompute="blocks", **axis) for axis in (*axes, {"zero": 3, "dp_shard": 2})]
    narrow += [spread(precision="bf16", microbatches=2, tp=2, pp=2), spread(precision="fp16", pp=2)]
    narrow += [spread(precision="bf16", recompute="blocks", cp=2, pp=2)]
    narrow += [spread(precision="bf16", recompute="blocks", tp=2, tp_sequence=True)]
    return {
        "one kind of parallelism": alone,
        "two kinds": two,
        "three kinds": three,
        "bf16 and fp16, recomputed or with micro-batches cut": narrow,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only to see that it runs")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--only", help="plans whose name has this in it")
    parser.add_argument("--models", nargs="*", default=list(MODELS), help="models by name")
    options = parser.parse_args()
    chosen = {title: [p for p in each if wanted(p, options)] for title, each in plans().items()}
    models = options.models[:1] if options.quick else options.models
    cases = {model: case_of(model) for model in models}
    everything = [plan for each in chosen.values() for plan in each]
    found: dict[tuple[str, Plan], Verdict | str] = {}
    for model in models:
        for size in sorted({degrees(plan) for plan in everything}):
            of_size = [plan for plan in everything if degrees(plan) == size]
            for plan, verdict in zip(of_size, held_against_one_process(cases[model], of_size, size)):
                found[model, plan] = verdict
                print(f"{model:8} {name_of(plan):50} {verdict}", flush=True)
    report = Report(name="parity", summary=str(__doc__))
    for title, each in chosen.items():
        if each:
            report.add(table_of(title, each, models, found))
    report.write(options.results)


def wanted(plan: Plan, options: argparse.Namespace) -> bool:
    name = name_of(plan)
    return name in QUICK if options.quick else options.only is None or options.only in name


def name_of(plan: Plan) -> str:
    text = str(plan).removesuffix(" fp32").removeprefix("zero=0 ")
    for word in ("dp_replicate=1 ", "dp_shard=1 "):
        text = text.replace(word, "")
    return text


def table_of(title: str, each: list[Plan], models: list[str], found: dict[tuple[str, Plan], Verdict | str]) -> Table:
    reasons: dict[str, int] = {}
    rows: list[list[str | float | None]] = []
    held = refused = 0
    for plan in each:
        row: list[str | float | None] = [name_of(plan), str(degrees(plan))]
        for model in models:
            verdict = found[model, plan]
            if isinstance(verdict, Verdict):
                held += verdict.holds
                share = verdict.largest.deviation / verdict.largest.tolerance
                row.append(f"{share:.3f}" if verdict.holds else f"DIFFERS: {verdict.first}")
            else:
                refused += verdict.startswith("refused")
                number = reasons.setdefault(verdict, len(reasons) + 1)
                row.append(f"{verdict.split(':')[0]} ({number})")
        rows.append(row)
    cells = len(each) * len(models)
    wrong = cells - held - refused
    notes = [f"{held} of {cells} cells compute what one process computes, {refused} are refused, {wrong} do not hold."]
    notes += [f"({number}) {reason}" for reason, number in reasons.items()]
    return Table(
        title=f"Plans of {title}",
        columns=["plan", "processes", *models],
        rows=rows,
        notes=["\n\n".join(notes)],
    )


if __name__ == "__main__":
    main()
