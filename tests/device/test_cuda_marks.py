"""On a GPU: the phases of a step are the stream's time, nothing waits for it, and they add up."""

from __future__ import annotations

import time

import pytest

torch = pytest.importorskip("torch")

from trainfleet.parallel.cuda_marks import stopwatch_for  # noqa: E402
from trainfleet.stopwatch import timed  # noqa: E402

pytestmark = [
    pytest.mark.device,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="marks of a stream need a GPU, and there is none"),
]


def test_the_phases_are_those_of_the_stream_and_add_up_to_the_time_of_the_steps() -> None:
    cycles = 200_000_000  # about a tenth of a second
    torch.cuda.synchronize()
    with stopwatch_for("cuda:0") as watch:
        total, begun = dict.fromkeys(watch.take(), 0.0), time.perf_counter()
        for _ in range(5):
            with timed("data"):
                time.sleep(0.05)
            before = time.perf_counter()
            with timed("forward"):
                torch.cuda._sleep(cycles)
            with timed("backward"):
                torch.cuda._sleep(2 * cycles)
            assert time.perf_counter() - before < 0.05, "a mark waited for the stream"
            torch.cuda.synchronize()  # as reading the loss does
            with timed("optimizer"):
                torch.cuda._sleep(cycles // 2)
            total = {phase: total[phase] + seconds for phase, seconds in watch.take().items()}
        torch.cuda.synchronize()
        seconds = time.perf_counter() - begun
        total = {phase: total[phase] + passed for phase, passed in watch.take().items()}
    assert sum(total.values()) == pytest.approx(seconds, rel=0.03)
    assert total["backward"] == pytest.approx(2 * total["forward"], rel=0.1)
    assert total["optimizer"] == pytest.approx(total["forward"] / 2, rel=0.2)
