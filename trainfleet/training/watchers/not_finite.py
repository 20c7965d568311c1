"""NotFinite: losses and gradients that must not be learned from, because they are no numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

from trainfleet.monitor.anomalies import AnomalyConfig, Spell
from trainfleet.training.watchers.watcher import Judgement, UnderWay, Watcher

if TYPE_CHECKING:
    from trainfleet.training.inspection import Finding

Explain: TypeAlias = "Callable[[UnderWay], Finding | None]"
"""Where the first number came from that is none; a collective, which all ranks call for the same step."""


class NotFinite(Watcher):
    """Judges by the loss and the norm, which are the same on all ranks. `config` is resolved."""

    def __init__(self, config: AnomalyConfig, explain: Explain | None = None) -> None:
        self._policies = {"loss_not_finite": config.loss_not_finite, "gradient_not_finite": config.gradient_not_finite}
        self._most = config.skips_in_a_row
        self._explain = explain
        self._spells = {kind: Spell() for kind in self._policies}
        self._in_a_row = 0

    def judge(self, under_way: UnderWay) -> Judgement | None:
        found = self._found(under_way)
        self._in_a_row = 0 if found is None else self._in_a_row + 1
        kind = found[0] if found is not None else None
        for other, spell in self._spells.items():
            if other != kind and (since := spell.ends()) is not None:
                return self._over(other, under_way.step - since)
        if found is None:
            return None
        policy, what = self._policies[found[0]], found[1]
        if policy is None or policy == "auto":
            return None
        is_news = self._spells[found[0]].begins(under_way.step)
        if policy == "skip" and self._in_a_row > self._most:
            return Judgement(policy="stop", kind=found[0], what=exhausted(what, self._most))
        # A rollback is told each time: the run is elsewhere afterwards.
        judgement = Judgement(policy=policy, kind=found[0], what=what, is_news=is_news or policy == "rollback")
        finding = self._explain(under_way) if is_news and self._explain is not None else None
        if finding is None:
            return judgement
        return replace(
            judgement,
            what=f"{what}: {finding.what}",
            rank=finding.rank,
            module=finding.module,
            samples=finding.indices or None,
            path=finding.path,
        )

    def _found(self, under_way: UnderWay) -> tuple[str, str] | None:
        """Under fp16 a norm that is not finite is an overflow, which the loss scale deals with."""
        if not math.isfinite(under_way.loss):
            return "loss_not_finite", f"The loss is {under_way.loss}"
        if under_way.loss_scale is None and not math.isfinite(under_way.grad_norm):
            return "gradient_not_finite", f"The norm of the gradient is {under_way.grad_norm}"
        return None

    def _over(self, kind: str, steps: int) -> Judgement:
        subject = "loss" if kind == "loss_not_finite" else "norm of the gradient"
        return Judgement(
            policy="warn", kind=kind, what=f"The {subject} is finite again, after {steps} steps", is_over=True
        )


def exhausted(what: str, most: int) -> str:
    """Why skipping ends."""
    return f"{what}, after {most} skipped updates in a row (monitor.anomalies.skips_in_a_row)"
