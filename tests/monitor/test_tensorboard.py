from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from trainfleet.errors import DependencyError
from trainfleet.events import AlertFired, AnomalySeen, Evaluated, RanksReported, Tracked
from trainfleet.monitor.tensorboard import TensorBoard

event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def read(folder: Path) -> Any:
    return event_accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()


def points(board: Any, tag: str) -> list[tuple[int, float]]:
    return [(point.step, round(point.value, 4)) for point in board.Scalars(tag)]


def test_steps_evaluations_own_numbers_and_texts_are_shown(tmp_path: Path, story: Any) -> None:
    board = TensorBoard(tmp_path, every=10)
    for event in [*story.run(), Tracked(step=3, name="mine/number", value=0.5)]:
        board.on_event(event)
    board.close()
    shown = read(tmp_path)
    assert [step for step, _ in points(shown, "train/loss")] == [10, 20, 30, 40]
    assert points(shown, "validation/accuracy") == [(10, 0.1), (20, 0.2), (30, 0.3), (40, 0.4)]
    assert points(shown, "mine/number") == [(3, 0.5)]
    assert points(shown, "speed/tokens_per_second")[0] == (10, 10240.0)
    assert set(shown.Tags()["tensors"]) == {f"{title}/text_summary" for title in ("recipe", "generated", "summary")}
    (text,) = shown.Tensors("generated/text_summary")
    assert text.tensor_proto.string_val[0] == b"    def f():\n        return 1\n"


def test_phases_and_mfu_are_scalars(tmp_path: Path, story: Any) -> None:
    board = TensorBoard(tmp_path)
    board.on_event(story.step(1, phases={"forward": 0.5, "data": 0.25, "checkpoint": 0.0}, mfu=0.375))
    board.close()
    shown = read(tmp_path)
    assert points(shown, "time/forward_seconds") == [(1, 0.5)] and points(shown, "time/data_seconds") == [(1, 0.25)]
    assert points(shown, "speed/mfu") == [(1, 0.375)]
    assert "time/checkpoint_seconds" not in shown.Tags()["scalars"]


def test_a_resumed_run_replaces_the_steps_it_takes_again(tmp_path: Path, story: Any) -> None:
    for start, last, loss in ((0, 9, 1.0), (6, 8, 2.0)):
        board = TensorBoard(tmp_path)
        board.on_event(story.started(start_step=start))
        for step in range(start + 1, last + 1):
            board.on_event(story.step(step, loss=loss))
        board.on_event(Evaluated(step=last, loss=loss))
        board.close()
    shown = read(tmp_path)
    assert points(shown, "train/loss") == [(n, 1.0) for n in range(1, 7)] + [(7, 2.0), (8, 2.0)]


def test_it_works_in_a_loop_that_says_nothing_at_its_start(tmp_path: Path, story: Any) -> None:
    board = TensorBoard(tmp_path)
    board.on_event(story.step(1, grad_norm=None))
    board.close()
    assert points(read(tmp_path), "train/loss")[0][0] == 1


def test_without_tensorboard_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.record_writer", None)
    with pytest.raises(DependencyError, match=r'pip install "trainfleet\[monitor\]"'):
        TensorBoard(tmp_path)


def test_machines_alerts_and_anomalies_are_shown(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    board.on_event(RanksReported(step=1, steps=1, ranks=[{"host": "a", "system": {"cpu_percent": 12.5}}]))
    board.on_event(AlertFired(step=2, alert="loss > 5", value=7.0, text="loss is 7"))
    board.on_event(AnomalySeen(step=3, kind="slow_rank", what="rank 1 is slow", policy="warn"))
    board.close()
    shown = read(tmp_path)
    assert points(shown, "system/a/cpu_percent") == [(1, 12.5)]
    (alert,) = shown.Tensors("alerts/text_summary")
    assert alert.tensor_proto.string_val[0] == b"    loss > 5\n    loss is 7\n"
    assert "anomalies/slow_rank/text_summary" in shown.Tags()["tensors"]
