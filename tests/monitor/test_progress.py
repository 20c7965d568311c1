from __future__ import annotations

import math
from typing import Any

from trainfleet.events import Evaluated
from trainfleet.monitor.progress import Progress, printable


def test_a_new_start_begins_again(story: Any) -> None:
    progress = Progress()
    progress.start(story.started(steps=9))
    progress.step(story.step(1))
    progress.start(story.started(steps=5))
    assert (progress.steps, progress.last) == (5, None) and math.isnan(progress.remaining_seconds)


def test_the_first_evaluation_is_not_praised() -> None:
    progress = Progress()
    assert [progress.evaluate(Evaluated(step=1, loss=loss)) for loss in (3.0, 2.0, 2.5, math.nan, 1.0)] == [
        False, True, False, False, True,
    ]  # fmt: skip


def test_printable_text_keeps_lines_and_letters() -> None:
    assert printable("a\tb\nß→\x00\x1b\x7f\ufffd") == "a\tb\nß→···\ufffd"
