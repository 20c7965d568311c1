from __future__ import annotations

import io
import math
import re
from typing import Any

from trainfleet.events import (
    AlertFired,
    AnomalyOver,
    AnomalySeen,
    CheckpointFailed,
    CheckpointSaved,
    Noted,
    RanksReported,
    Restored,
    RunEnded,
    SamplesSkipped,
    Tracked,
)
from trainfleet.monitor.lines import Lines


def printed(*events: Any, log_interval: int = 10) -> list[str]:
    file = io.StringIO()
    lines = Lines(file, log_interval=log_interval)
    for event in events:
        lines.on_event(event)
    lines.close()
    return file.getvalue().splitlines()


def test_the_first_the_last_and_each_nth_step_get_a_line(story: Any) -> None:
    lines = printed(story.started(steps=25), *[story.step(step) for step in range(1, 26)])
    assert [int(line.split()[1].split("/")[0]) for line in lines if line.startswith("step")] == [1, 10, 20, 25]


def test_a_step_line_says_loss_speed_memory_and_what_remains(story: Any) -> None:
    (line,) = printed(story.started(steps=3), story.step(1, loss=2.0))[1:]
    for word in ("1/3", "loss 2.0000", "smooth 2.0000", "lr 3.00e-04", "grad 0.5", "tokens/s 10240", "samples/s 80.0"):
        assert word in line
    assert "memory 412 MB" in line and re.search(r"eta \d:\d\d$", line)


def test_columns_stay_below_each_other(story: Any) -> None:
    lines = printed(story.started(steps=1000), story.step(10, grad_norm=None), story.step(1000, grad_norm=1.23))[1:]
    assert {line.index("eta") for line in lines} == {lines[0].index("eta")}


def test_a_skipped_step_and_starving_are_said(story: Any) -> None:
    (line,) = printed(story.step(3, skipped=True, loss=math.nan, loss_scale=512.0, data_seconds=0.05), log_interval=100)
    assert "skipped: overflow at loss scale 512.0" in line and "waits for data 50%" in line and "loss nan" in line


def test_an_own_number_gets_a_line_at_most_every_interval(story: Any) -> None:
    tracked = [Tracked(step=step, name="accuracy", value=step / 100) for step in range(1, 31)]
    assert printed(story.started(), *tracked)[1:] == [
        "track      1/40  accuracy 0.01",
        "track     11/40  accuracy 0.11",
        "track     21/40  accuracy 0.21",
    ]


def test_the_mfu_is_that_of_the_last_steps_and_a_slow_rank_gets_a_line(story: Any) -> None:
    steps = [story.step(1), story.step(2, mfu=0.2, seconds=3.0), story.step(3, mfu=0.6, seconds=1.0)]
    waits, works = ({"communication": seconds, "forward": 1.0 - seconds} for seconds in (0.5, 0.0))
    ranks = [{"host": "here", "device": "cpu", "seconds": 1.0, "phases": phases} for phases in (waits, works)]
    reports = [RanksReported(step=3, steps=1, ranks=ranks)] * 3
    first, *_, third, slow = printed(*steps, *reports, log_interval=1)
    assert "mfu" not in first and third.endswith("mfu 30.0%")
    assert slow.startswith("slow  ") and "rank 1 on here is slow in forward" in slow


def test_what_a_model_generates_cannot_touch_the_terminal() -> None:
    lines = printed(Noted(step=5, title="generated", text="a\x1b[2J\x07b\r\n\tcé\x9b"))
    assert lines == ["note        5  generated", "   |  a·[2J·b·", "   |  \tcé·"]


def test_a_console_that_knows_only_ascii_is_no_reason_to_fail() -> None:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    Lines(file, log_interval=1).on_event(Noted(step=1, title="é", text="→"))
    assert raw.getvalue() == b"note        1  ?\n   |  ?\n"


def test_saves_restores_and_bad_samples_are_said() -> None:
    lines = printed(
        CheckpointSaved(step=5, path="c/5", seconds=0.01),
        CheckpointFailed(step=6, reason="No space left on device"),
        Restored(step=5, path="c/5"),
        SamplesSkipped(count=2, example="a.png"),
    )
    assert [line.split()[0] for line in lines] == ["save", "save", "load", "skip"]
    assert "FAILED: No space left on device" in lines[1]


def test_the_end_is_a_table_with_baselines_beside_the_result() -> None:
    summary = {"validation loss": 1.67131, "baseline/unigram": 3.29, "text": "a\n\x1bb"}
    lines = printed(RunEnded(step=40, reason="finished", seconds=192.0, summary=summary))
    assert lines == [
        "end        40  finished  took 3:12",
        "   |  validation loss  1.6713",
        "   |  unigram          3.2900",
        "   |  text             a",
        "   |  ·b",
    ]


def test_what_a_fed_step_waited_for_adds_up_and_the_end_says_what_was_the_limit(story: Any) -> None:
    waits = {"source": 0.02, "transform": 0.01, "network": 0.003, "data": 0.0}
    steps = [
        story.step(step, data_seconds=0.033, waits=waits, received_bytes=2_000_000, ready=3) for step in range(1, 21)
    ]
    end = RunEnded(step=20, reason="finished", seconds=2.0, summary={"validation loss": 1.0})
    lines = printed(story.started(steps=20), *steps, end)
    assert "waits for data 33%: source 20% transform 10% network 3%" in lines[-5]
    assert "feed 10.0 steps/s 20 MB/s 3 ready" in lines[-5]
    assert lines[-2] == "   |  time             67% computing, 20% source, 10% transform, 3% network"
    assert lines[-1].startswith(
        "   |  limit            Reading the samples is the limit: raise data.workers, start more"
    )


def test_alerts_and_anomalies_have_one_line_each(story: Any) -> None:
    alert = AlertFired(step=3, alert="loss > 5", value=7.0, text="loss > 5: loss is 7\nand\x1b[2J more")
    fields = {"rank": 1, "module": "layers.3", "path": "runs/x/bad"}
    seen = AnomalySeen(step=4, kind="loss_not_finite", what="the loss is nan", policy="skip", **fields)
    warned = AnomalySeen(step=5, kind="slow_rank", what="x", policy="warn")
    over = AnomalyOver(step=9, kind="slow_rank", what="no x after 4 steps")
    lines = printed(story.started(steps=40), alert, seen, warned, over)
    assert lines[1:] == [
        "alert      3/40  loss > 5: loss is 7 and\N{MIDDLE DOT}[2J more",
        "anom       4/40  loss_not_finite  the loss is nan  rank 1  in layers.3  saved in runs/x/bad  step skipped",
        "anom       5/40  slow_rank  x  run goes on",
        "anom       9/40  slow_rank  no x after 4 steps  over",
    ]
