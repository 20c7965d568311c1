from __future__ import annotations

from pathlib import Path

import pytest

from trainfleet.errors import StoreError
from trainfleet.monitor.drawing import COLORS, MAX_POINTS, PHASE_COLORS, new_figure, series, smooth, write_png
from trainfleet.monitor.history.goodput import UNDONE
from trainfleet.monitor.limit import COMPUTING
from trainfleet.monitor.spent import OUTSIDE
from trainfleet.stopwatch import PHASES


def test_many_points_are_thinned_and_the_last_is_kept() -> None:
    rows = [{"step": step, "loss": float(step)} for step in range(1, 10_002)]
    steps, values = series(rows, "loss")
    assert len(steps) <= MAX_POINTS and (steps[-1], values[-1]) == (10_001, 10_001.0)


def test_the_smoothed_line_does_not_lag_behind_a_straight_one() -> None:
    values = [float(n) for n in range(200)]
    assert smooth(values)[:190] == pytest.approx(values[:190], abs=1e-9)


def test_every_part_of_the_time_has_its_colour() -> None:
    assert set(PHASE_COLORS) == {*PHASES, COMPUTING, UNDONE, OUTSIDE} and len(set(COLORS)) == len(COLORS)


def test_a_picture_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=str(tmp_path)):
        write_png(new_figure(1.0), tmp_path / "file" / "loss.png")
