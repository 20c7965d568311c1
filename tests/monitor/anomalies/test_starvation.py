"""A run that waits for its batches is told why."""

from __future__ import annotations

from collections.abc import Callable

from trainfleet.events import StepEnded
from trainfleet.monitor.anomalies import Finding, Starvation


def found(waits: Callable[[int], float], *, steps: int = 300, lasting: float = 30.0, **fields: object) -> list[Finding]:
    """Of steps of a second that wait as `waits` says."""
    starvation = Starvation(share=0.5, lasting_seconds=lasting)
    findings = []
    for i in range(1, steps):
        waited = waits(i)
        causes = {"source": 0.75 * waited, "transform": 0.25 * waited}
        ended = StepEnded(
            step=i,
            loss=1.0,
            learning_rate=0.1,
            grad_norm=1.0,
            samples=1,
            tokens=1,
            seconds=1.0,
            data_seconds=waited,
            waits=causes,
            **fields,  # type: ignore[arg-type]
        )
        findings.append(starvation.end(ended))
    return [each for each in findings if each is not None]


def test_a_starving_run_hears_the_cause_and_the_remedy_once() -> None:
    (finding,) = found(lambda i: 0.4)
    assert finding.kind == "data_starvation"
    assert finding.what.startswith(
        "100% of the last 30 steps waited for their batches, 40% of their time, mostly for source. "
    )
    assert "raise data.workers" in finding.what and not finding.what.endswith(".")


def test_it_is_told_when_it_is_over() -> None:
    begun, over = found(lambda i: 0.4 if i < 100 else 0.0)
    assert not begun.is_over and over.is_over and "25% of the steps wait for batches now" in over.what


def test_a_warm_up_a_wait_now_and_then_and_short_waits_are_no_starvation() -> None:
    assert found(lambda i: 5.0 if i <= 5 else 0.0) == []
    assert found(lambda i: 0.9 if i % 3 == 0 else 0.0) == []
    assert found(lambda i: 0.15) == []
    assert found(lambda i: 0.9 if i > 50 else 0.0, steps=95) == [], "less than half of the window"


def test_where_the_cause_is_not_known_batches_are() -> None:
    (finding,) = found(lambda i: 0.4, received_bytes=9)
    assert "start more feeders" in finding.what
