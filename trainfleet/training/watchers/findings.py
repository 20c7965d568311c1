"""Findings: what was found on one rank is told to all of them with the reports, and judged by all alike."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Protocol

from trainfleet.events import Event, RanksReported, StepEnded
from trainfleet.monitor.anomalies import AnomalyConfig, Disk, Finding
from trainfleet.training.watchers.watcher import Judgement, Policy, UnderWay, Watcher

FOUND = "found"
"""The key of a rank's report that holds its findings."""


class OfSteps(Protocol):
    """Looks at the steps of this rank."""

    def end(self, ended: StepEnded) -> Finding | None: ...


class OfReports(Protocol):
    """Looks at the reports of all ranks."""

    def hear(self, report: RanksReported) -> Finding | None: ...


class Findings(Watcher):
    """Runs detectors. A finding of this rank waits for the next report, which all ranks hear; one of a report does not.

    So what is judged, and with it whether the run stops, is the same on all ranks in the same step.
    """

    def __init__(
        self,
        config: AnomalyConfig,
        *,
        of_steps: Sequence[OfSteps],
        of_reports: Sequence[OfReports],
        disk: Disk | None = None,
    ) -> None:
        self._config, self._disk = config, disk
        self._ends = [each.end for each in (*of_steps, *([disk] if disk is not None else []))]
        self._of_reports = of_reports
        self._own: list[Finding] = []
        self._news: deque[Finding] = deque()
        self._ranks: dict[str, set[int]] = {}  # by kind, those that are in it

    def add(self, finding: Finding) -> None:
        """Something that was found on this rank."""
        self._own.append(finding)

    def end(self, ended: StepEnded) -> None:
        for look in self._ends:
            if (finding := look(ended)) is not None:
                self.add(finding)

    def tell(self) -> list[dict[str, Any]]:
        told, self._own = [asdict(each) for each in self._own], []
        return told

    def hear(self, event: Event) -> None:
        if self._disk is not None:
            self._disk.hear(event)
        if not isinstance(event, RanksReported):
            return
        self._news.extend(finding for each in self._of_reports if (finding := each.hear(event)) is not None)
        found = [(rank, Finding(**each)) for rank, report in enumerate(event.ranks) for each in report.get(FOUND, ())]
        once: set[str] = set()
        # Of those that found the same, the one that knows whose fault it is speaks.
        for rank, finding in sorted(found, key=lambda pair: pair[1].rank is None):
            if (finding.lasts and not self._is_first(rank, finding)) or (not finding.lasts and finding.kind in once):
                continue
            once.add(finding.kind)
            self._news.append(finding)

    def _is_first(self, rank: int, finding: Finding) -> bool:
        """Whether no rank was in it before, or none is any more."""
        ranks = self._ranks.setdefault(finding.kind, set())
        before = bool(ranks)
        if finding.is_over:
            ranks.discard(rank)
            return before and not ranks
        ranks.add(rank)
        return not before

    def judge(self, under_way: UnderWay) -> Judgement | None:
        if not self._news:
            return None
        finding = self._news.popleft()
        policy: Policy = "warn" if finding.is_over else getattr(self._config, finding.kind)
        return Judgement(
            policy=policy,
            kind=finding.kind,
            what=finding.what,
            rank=finding.rank,
            module=finding.module,
            is_over=finding.is_over,
        )
