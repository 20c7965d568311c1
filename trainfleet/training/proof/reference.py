"""Reference: what one process computes, against which plans are held."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from trainfleet.mesh import Mesh
from trainfleet.plan import Plan
from trainfleet.training.proof.case import Case, has_batch_statistics, together
from trainfleet.training.proof.trace import trace
from trainfleet.training.proof.verdict import CONCATENATED_SLACK, TOLERANCE, Trace, Verdict, compare, joined

if TYPE_CHECKING:
    from trainfleet.parallel.choices import Kind, Ties


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """What one process computes, and how far rounding explains that others are off it."""

    precision: str
    slack: float
    trace: Trace
    rounded: Sequence[Trace]
    """The same work rounded in other ways: they show what rounding does to this very model."""
    ties: Mapping[Kind, Ties]
    """What was chosen where rounding could decide."""

    @classmethod
    def of(cls, case: Case, plan: Plan, ranks: int) -> Reference:
        """Run `case` in this process, with the micro-batches of all `ranks` that see different data."""
        from trainfleet.parallel.choices import Telling, taking

        tolerance = TOLERANCE[plan.precision]
        work = together(case, ranks)
        alone = Plan(precision=plan.precision, loss_scale=plan.loss_scale, microbatches=plan.microbatches)
        others = [(replace(work, shake=tolerance), alone)]
        if plan.precision != "fp32":
            others.append((work, replace(alone, precision="fp32")))
        telling = Telling(tolerance)
        with Mesh.from_env(alone) as mesh:
            first = trace(work, alone, mesh, telling)
            ties = {} if plan.compile else telling.ties()  # nobody looks into compiled blocks
            rounded = [trace(each, its_plan, mesh, taking(tolerance, ties)) for each, its_plan in others]
        slack = CONCATENATED_SLACK[plan.precision] if has_batch_statistics(case) else 1.0
        return cls(precision=plan.precision, slack=slack, trace=first, rounded=rounded, ties=ties)

    def verdict(self, ranks: Sequence[Trace], remarks: Sequence[str] = ()) -> Verdict:
        """Whether what several `ranks` computed together is this, but for rounding."""
        if number := sum(len(ties.rows) for ties in self.ties.values()):
            remarks = (
                *remarks,
                f"In {number} choices, as of experts, one process took the largest of numbers that rounding cannot "
                "tell apart; under the plan the same are taken there.",
            )
        return compare(
            self.trace, joined(ranks), self.precision, slack=self.slack, rounded=self.rounded, remarks=remarks
        )
