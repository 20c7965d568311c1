"""Outlier: a loss, or a norm of the gradient, that jumps out of its own history."""

from __future__ import annotations

import math

from trainfleet.monitor.anomalies import AnomalyConfig, Jump, Jumps, Spell
from trainfleet.monitor.anomalies.jumps import NEAR
from trainfleet.monitor.units import readable_loss
from trainfleet.training.watchers.not_finite import exhausted
from trainfleet.training.watchers.watcher import Judgement, Policy, UnderWay, Watcher

RISE = 0.25
"""A loss that is higher by less than this share of the usual is no spike, however calm it was before."""
LEVEL = 0.05
"""Nor is one that lies above the usual by less than this share of the first losses: what was learned is not lost."""
SMALL = 0.1
"""A norm below this share of the first norms does not explode."""


class Outlier(Watcher):
    """Judges one number of a step, which is the same on all ranks. Subclasses say which, and what it is called."""

    kind: str
    subject: str

    def __init__(self, policy: Policy, jumps: Jumps, *, skips_in_a_row: int) -> None:
        self._policy, self._jumps, self._most = policy, jumps, skips_in_a_row
        self._spell = Spell()
        self._out: list[float] = []  # in a row

    def number(self, under_way: UnderWay) -> float | None:
        """What is judged; None where there is nothing to judge."""
        raise NotImplementedError

    def sentence(self, number: float, usual: float, deviations: float) -> str:
        raise NotImplementedError

    def jump(self, number: float) -> Jump | None:
        return self._jumps.judge(number)

    def accept(self, number: float) -> None:
        """As one of the usual."""
        self._jumps.accept(number)

    def forget(self) -> None:
        self._jumps.forget()

    def judge(self, under_way: UnderWay) -> Judgement | None:
        number = self.number(under_way)
        if number is None:
            return None
        jump = self.jump(number)
        if jump is None:
            self._out = []
            self.accept(number)
            since = self._spell.ends()
            return None if since is None else self._over(f"as usual again, after {under_way.step - since} steps")
        self._out.append(number)
        what = self.sentence(number, jump.usual, jump.deviations)
        if self._policy == "skip" and len(self._out) > self._most:
            return Judgement(policy="stop", kind=self.kind, what=exhausted(what, self._most))
        if self._policy == "warn" and len(self._out) == NEAR:  # it is what the run is like now
            self.forget()
            for each in self._out:
                self.accept(each)
            self._out, self._spell = [], Spell()
            return self._over(f"as high for {NEAR} steps, which is the usual from now on")
        is_news = self._spell.begins(under_way.step) or self._policy == "rollback"
        return Judgement(policy=self._policy, kind=self.kind, what=what, is_news=is_news)

    def _over(self, how: str) -> Judgement:
        what = f"The {self.subject} is {how}"
        return Judgement(policy="warn", kind=self.kind, what=what, is_over=True)


class LossSpike(Outlier):
    """Of the loss; see `Jumps` for when. Where losses are positive, it has to jump as their logarithms do, too.

    Losses of few samples that are learned differ by orders of magnitude, and no deviation bounds them.
    """

    kind = "loss_spike"
    subject = "loss"

    def __init__(self, config: AnomalyConfig, policy: Policy) -> None:
        def is_worth(loss: float, usual: float, first: float) -> bool:
            return loss - usual > max(RISE * abs(usual), LEVEL * abs(first))

        super().__init__(
            policy, Jumps(deviations=config.spike_deviations, is_worth=is_worth), skips_in_a_row=config.skips_in_a_row
        )

        self._logs = Jumps(deviations=config.spike_deviations, is_worth=lambda *_: True)

    def jump(self, number: float) -> Jump | None:
        jump = super().jump(number)
        if jump is None or number <= 0 or not self._logs.knows_enough or self._logs.judge(math.log(number)):
            return jump
        return None

    def accept(self, number: float) -> None:
        super().accept(number)
        if number > 0:
            self._logs.accept(math.log(number))

    def forget(self) -> None:
        super().forget()
        self._logs.forget()

    def number(self, under_way: UnderWay) -> float | None:
        return under_way.loss if math.isfinite(under_way.loss) else None

    def sentence(self, number: float, usual: float, deviations: float) -> str:
        return (
            f"The loss is {readable_loss(number)}, where {readable_loss(usual)} is usual: "
            f"{min(deviations, 999):.0f} robust standard deviations above"
        )


class GradientExplosion(Outlier):
    """Of the logarithm of the norm, for norms differ by factors."""

    kind = "gradient_explosion"
    subject = "norm of the gradient"

    def __init__(self, config: AnomalyConfig, policy: Policy) -> None:
        factor = math.log(config.explosion_factor)

        def is_worth(norm: float, usual: float, first: float) -> bool:
            return norm - usual > factor and norm > first + math.log(SMALL)

        super().__init__(
            policy, Jumps(deviations=config.spike_deviations, is_worth=is_worth), skips_in_a_row=config.skips_in_a_row
        )

    def number(self, under_way: UnderWay) -> float | None:
        norm = under_way.grad_norm
        return math.log(norm) if math.isfinite(norm) and norm > 0 else None

    def sentence(self, number: float, usual: float, deviations: float) -> str:
        norm, normal = math.exp(number), math.exp(usual)
        return f"The norm of the gradient is {norm:.4g}, {norm / normal:.0f} times the usual {normal:.4g}"
