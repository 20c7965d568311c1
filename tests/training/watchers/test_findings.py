"""What one rank finds is told to all with the next report, and judged by all alike."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")

from trainfleet.events import RanksReported, StepEnded
from trainfleet.monitor.anomalies import AnomalyConfig, Finding
from trainfleet.training.watchers.findings import FOUND, Findings
from trainfleet.training.watchers.watcher import Judgement

ENDED = StepEnded(step=1, loss=1, learning_rate=1, grad_norm=1, samples=1, tokens=1, seconds=1, data_seconds=0)


class Always:
    """Finds something at each step."""

    def __init__(self, **finding: Any) -> None:
        self.finding = Finding(**{"kind": "data_starvation", "what": "It starves", **finding})

    def end(self, ended: StepEnded) -> Finding:
        return self.finding

    def hear(self, report: RanksReported) -> Finding:
        return self.finding


def of(*of_steps: Any, of_reports: Any = (), **config: Any) -> Findings:
    return Findings(AnomalyConfig(**config), of_steps=of_steps, of_reports=of_reports)


def report(*told: list[dict[str, Any]]) -> RanksReported:
    return RanksReported(step=10, steps=10, ranks=[{FOUND: each} if each else {} for each in told])


def judgements(findings: Findings) -> list[Judgement]:
    found = []
    while (judgement := findings.judge(None)) is not None:  # type: ignore[arg-type]
        found.append(judgement)
    return found


def test_what_a_rank_finds_is_judged_on_all_once_it_was_told() -> None:
    finder, other = of(Always(rank=1), data_starvation="stop"), of(data_starvation="stop")
    finder.end(ENDED)
    assert finder.judge(None) is None, "nobody else knows"  # type: ignore[arg-type]
    told = finder.tell()
    assert finder.tell() == [] and other.tell() == []
    for each in (finder, other):
        each.hear(report([], told))
    assert (
        judgements(finder)
        == judgements(other)
        == [Judgement(policy="stop", kind="data_starvation", what="It starves", rank=1)]
    )


def test_the_same_from_several_ranks_is_told_once_and_is_over_when_none_has_it() -> None:
    findings = of()
    begun, over = [vars_of(Finding(kind="slow_rank", what="so", is_over=is_over)) for is_over in (False, True)]
    findings.hear(report([begun], [begun]))
    findings.hear(report([over], []))
    findings.hear(report([begun], []))
    assert [each.is_over for each in judgements(findings)] == [False]
    findings.hear(report([over], [over]))
    assert [each.is_over for each in judgements(findings)] == [True]


def vars_of(finding: Finding) -> dict[str, Any]:
    findings = of()
    findings.add(finding)
    return findings.tell()[0]


def test_of_those_that_saw_a_stall_the_one_that_hung_speaks_and_the_next_is_told_again() -> None:
    findings = of()
    waited, hung = [
        vars_of(Finding(kind="stalled_step", what=f"rank {rank}", rank=rank, lasts=False)) for rank in (None, 1)
    ]
    for _ in range(2):
        findings.hear(report([waited], [hung]))
        assert [each.what for each in judgements(findings)] == ["rank 1"]


def test_what_all_see_in_a_report_needs_no_telling() -> None:
    findings = of(of_reports=[Always(kind="memory_growth")])
    findings.hear(report([], []))
    assert [each.kind for each in judgements(findings)] == ["memory_growth"] and findings.tell() == []
