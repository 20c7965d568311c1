"""A step that hangs is told while it does: phase, line and rank; what may take long is left alone."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("torch")

from trainfleet.comm.environment import RUN_ID
from trainfleet.events import StepEnded
from trainfleet.monitor.anomalies import AnomalyConfig, Finding
from trainfleet.stopwatch import Stopwatch, timed
from trainfleet.training.watchers.stall import ENOUGH, Stalls

FLOOR = 0.15


@contextmanager
def watching(found: list[Finding], steps: int = ENOUGH, floor: float = FLOOR) -> Iterator[Stalls]:
    """A loop that has taken some quick steps."""
    config = AnomalyConfig(stall_floor_seconds=floor, stall_factor=2.0)
    stalls = Stalls(found.append, config, rank=3, folder=None)
    with Stopwatch():
        stalls.start(None)  # type: ignore[arg-type]
        try:
            for step in range(1, steps + 1):
                end(stalls, step)
            yield stalls
        finally:
            stalls.close()


def end(stalls: Stalls, step: int) -> None:
    stalls.begin(step, [])
    stalls.end(
        StepEnded(step=step, loss=1, learning_rate=1, grad_norm=1, samples=1, tokens=1, seconds=0.01, data_seconds=0)
    )


def hang(seconds: float = 3 * FLOOR) -> None:
    time.sleep(seconds)


def test_a_stall_is_told_while_it_lasts_and_once_more_when_it_is_over(caplog: pytest.LogCaptureFixture) -> None:
    found: list[Finding] = []
    with watching(found) as stalls, caplog.at_level(logging.WARNING, "trainfleet"):
        stalls.begin(6, [])
        with timed("data"):
            hang(6 * FLOOR)
        (warning,) = caplog.messages
        assert warning.startswith(
            "Nothing was heard of step 6 for 0 s, where 0.01 s are usual: rank 3 hung in data, at "
        )
        assert warning.endswith("in hang.") and __file__ in warning
        end(stalls, 6)
        (finding,) = found
        assert (finding.kind, finding.rank, finding.lasts) == ("stalled_step", 3, False)
        end(stalls, 7)
        assert len(found) == len(caplog.messages) == 1


def test_who_waits_for_others_says_so(caplog: pytest.LogCaptureFixture) -> None:
    found: list[Finding] = []
    with watching(found) as stalls, caplog.at_level(logging.WARNING, "trainfleet"):
        with timed("communication"):
            hang()
        end(stalls, 6)
    assert "rank 3 waited for other ranks in communication" in caplog.text and found[0].rank is None


@pytest.mark.parametrize("phase", ["evaluation", "checkpoint"])
def test_evaluations_and_saves_may_take_long(phase: str, caplog: pytest.LogCaptureFixture) -> None:
    found: list[Finding] = []
    with watching(found) as stalls, caplog.at_level(logging.WARNING, "trainfleet"):
        with timed(phase):
            hang()
        end(stalls, 6)
    assert found == [] and caplog.messages == []


def test_a_compilation_may_take_long(caplog: pytest.LogCaptureFixture) -> None:
    compile_slowly = "import time\ndef compile_slowly():\n    time.sleep(0.5)\n"
    names: dict[str, object] = {}
    exec(compile(compile_slowly, "/site-packages/torch/_dynamo/convert_frame.py", "exec"), names)
    with watching([]), caplog.at_level(logging.WARNING, "trainfleet"):
        names["compile_slowly"]()  # type: ignore[operator]
    assert caplog.messages == []


def test_quick_steps_the_first_ones_and_what_comes_after_the_loop_are_no_stalls(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, "trainfleet"):
        with watching([]) as stalls:
            for step in range(6, 30):
                time.sleep(FLOOR / 10)
                end(stalls, step)
        with watching([], steps=ENOUGH - 1):
            hang()
        hang()
    assert caplog.messages == []


def test_the_thread_ends_with_the_loop_and_a_forked_child_has_none() -> None:
    before = threading.active_count()
    with watching([], floor=0.01) as stalls:
        assert threading.active_count() == before + 1
        for _ in range(5):  # at any moment of the thread
            child = os.fork()
            if child == 0:
                stalls.close()
                os._exit(threading.active_count())
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
    stalls.close()


HANGS = """
import sys, time
from pathlib import Path
from trainfleet import log
from trainfleet.events import StepEnded
from trainfleet.monitor.anomalies import AnomalyConfig
from trainfleet.stopwatch import Stopwatch, timed
from trainfleet.training.watchers.stall import Stalls

log.setup()
config = AnomalyConfig(stalled_step="stop", stall_floor_seconds=0.1, stall_factor=2.0, stall_stop_seconds=0.3)
stalls = Stalls(print, config, rank=0, folder=Path(sys.argv[1]))
with Stopwatch():
    stalls.start(None)
    for step in range(1, 8):
        stalls.begin(step, [])
        stalls.end(StepEnded(step=step, loss=1, learning_rate=1, grad_norm=1, samples=1, tokens=1, seconds=0.01,
                             data_seconds=0))
    stalls.begin(8, [])
    with timed("forward"):
        time.sleep(60)
"""


@pytest.mark.parametrize("launched", [False, True])
def test_under_stop_the_process_ends_with_its_code_and_leaves_a_report(tmp_path: Path, launched: bool) -> None:
    own = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    own |= {"TORCHELASTIC_RUN_ID": RUN_ID, "TORCHELASTIC_ERROR_FILE": str(tmp_path / "error.json")}
    done = subprocess.run(
        [sys.executable, "-c", HANGS, str(tmp_path)],
        env={**os.environ, **(own if launched else {})},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 18, done.stderr
    if launched:
        report = json.loads((tmp_path / "failure.json").read_text())
        assert report["exit_code"] == 18 and report["step"] == 7 and not report["consequence"]
        said = report["sentence"]
    else:
        said = (tmp_path / "failure.txt").read_text()
        assert "did not end step 8" in done.stderr
    assert "did not end step 8 for 0 s: it hung in forward, at <string>:" in said
