"""slow_rank: the rank that the others wait for, and the phase in which it falls behind."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from trainfleet.events import RanksReported
from trainfleet.monitor.units import readable_rate

NOTABLE = 0.1
"""What a rank takes longer than the others, of the time of the steps, before anyone is told."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SlowRank:
    """Ranks go in step, so one that is slow shows by what it takes beside communication, in which the others wait."""

    rank: int
    host: str
    phase: str
    """The phase that exceeds the others' most."""
    seconds: float
    """What a step of this rank takes there."""
    usual_seconds: float
    """And of the others, in the median."""
    behind: float
    """The share of a step's time in which the others, in the median, wait for it."""

    def __str__(self) -> str:
        took, usual = (f"{readable_rate(seconds * 1e3)} ms" for seconds in (self.seconds, self.usual_seconds))
        return (
            f"rank {self.rank} on {self.host} is slow in {self.phase}: {took} a step, the others {usual}; "
            f"they wait {self.behind:.0%} of the time for it"
        )


def slow_rank(report: RanksReported) -> SlowRank | None:
    """The slowest, where it is notably slower than the others; None where ranks are alike, or there is but one."""
    ranks = report.ranks
    if len(ranks) < 2:
        return None
    busy = [rank["seconds"] - rank["phases"].get("communication", 0.0) for rank in ranks]
    slowest = max(range(len(ranks)), key=busy.__getitem__)
    others = [rank["phases"] for i, rank in enumerate(ranks) if i != slowest]
    behind = busy[slowest] - statistics.median(seconds for i, seconds in enumerate(busy) if i != slowest)
    if behind <= NOTABLE * ranks[slowest]["seconds"]:
        return None
    phases = ranks[slowest]["phases"]
    usual = {phase: statistics.median(each.get(phase, 0.0) for each in others) for phase in phases}
    phase = max((each for each in phases if each != "communication"), key=lambda each: phases[each] - usual[each])
    return SlowRank(
        rank=slowest,
        host=ranks[slowest]["host"],
        phase=phase,
        seconds=phases[phase] / report.steps,
        usual_seconds=usual[phase] / report.steps,
        behind=behind / ranks[slowest]["seconds"],
    )
