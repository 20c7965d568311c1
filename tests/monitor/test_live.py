from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import textwrap
from typing import Any

from trainfleet.events import AlertFired, AnomalyOver, AnomalySeen, Tracked
from trainfleet.monitor.live import LiveLine, fit_line
from trainfleet.monitor.progress import Progress


def progress_of(story: Any, **fields: Any) -> Progress:
    progress = Progress()
    progress.start(story.started(steps=3000))
    progress.step(story.step(412, **fields))
    return progress


def test_the_line_never_wraps(story: Any) -> None:
    progress = progress_of(story, loss_scale=65536.0, data_seconds=0.05)
    progress.track(Tracked(step=412, name="accuracy of the held-out part", value=0.25))
    for width in range(8, 240):
        assert fit_line(progress, width=width).cell_len <= width


def test_what_matters_least_gives_way_first(story: Any) -> None:
    progress = progress_of(story)
    names = ["loss", "tokens/s", "left", "mem", "━", "now", "lr", "grad", "samples/s"]
    counts = [sum(name in fit_line(progress, width=width).plain for name in names) for width in range(10, 160)]
    assert counts == sorted(counts) and counts[-1] == len(names)
    assert all(name in fit_line(progress, width=79).plain for name in names[:5])


def test_an_own_number_is_shown_where_there_is_room(story: Any) -> None:
    progress = progress_of(story)
    progress.track(Tracked(step=412, name="accuracy", value=0.25))
    progress.track(Tracked(step=0, name="baseline/unigram", value=3.29))
    line = fit_line(progress, width=200).plain
    assert "accuracy 0.25" in line and "unigram" not in line


def test_the_mfu_is_shown_where_there_is_room(story: Any) -> None:
    progress = progress_of(story, mfu=0.4125)
    assert "mfu 41.2%" in fit_line(progress, width=200).plain
    assert "mfu" not in fit_line(progress, width=79).plain


def test_samples_stand_in_where_there_are_no_tokens(story: Any) -> None:
    line = fit_line(progress_of(story, tokens=8), width=79).plain
    assert "samples/s 80.0" in line and "tokens/s" not in line


def test_a_fed_run_says_what_it_waits_for_where_there_is_room(story: Any) -> None:
    waits = {"source": 0.02, "transform": 0.01, "network": 0.003}
    progress = progress_of(story, data_seconds=0.033, waits=waits, received_bytes=2_000_000, ready=3)
    assert "waits for data 33%" in fit_line(progress, width=100).plain
    line = fit_line(progress, width=200).plain
    assert "of it source 20% transform 10% network 3%" in line and "feed 10.0 steps/s 20 MB/s 3 ready" in line


def in_terminal(program: str) -> str:
    """What a program writes to a terminal of its own."""
    main, side = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=side, stderr=side, env={**os.environ, "TERM": "xterm"}
    )
    os.close(side)
    output = b""
    try:
        while chunk := os.read(main, 65536):
            output += chunk
    except OSError:  # the terminal's other side is closed
        pass
    assert process.wait(timeout=30) == 0, output
    return output.decode()


def test_in_a_terminal_prints_stay_above_the_line_and_the_terminal_is_given_back() -> None:
    output = in_terminal(
        """
        import sys
        from trainfleet.events import Evaluated, Noted, RunEnded, RunStarted, StepEnded
        from trainfleet.monitor.console import Console
        import logging
        from trainfleet import log
        log.setup()
        stdout = sys.stdout
        console = Console()
        console.on_event(RunStarted(folder="runs/x", steps=2, start_step=0, world_size=2, parameters=5, plan="zero=2"))
        for step in (1, 2):
            console.on_event(StepEnded(step=step, loss=2.0, learning_rate=0.1, grad_norm=None, samples=1, tokens=9,
                                       seconds=0.1, data_seconds=0.0))
            print("mine", step)
            logging.getLogger("trainfleet.data").warning("beware %d", step)
        console.on_event(Evaluated(step=2, loss=1.25))
        console.on_event(Noted(step=2, title="[b]generated", text="[red]x\\x1b[2J"))
        console.on_event(RunEnded(step=2, reason="finished", seconds=1.0, summary={"validation loss": 1.25}))
        console.close()
        console.close()
        assert sys.stdout is stdout
        """
    )
    for words in (
        "runs/x",
        "5 parameters on 2 processes",
        "mine 1",
        "mine 2",
        "2/2",
        "1.2500",
        "finished",
        "[b]generated",
    ):
        assert words in output, words
    assert re.search(r"\r\x1b\[2K\d\d:\d\d:\d\d WARNING trainfleet.data: beware 2", output), "it stands on its own line"
    assert "[red]x·[2J" in output and "\x1b[2J" not in output
    assert output.index("\x1b[?25h") < output.index("1/2"), "a rank that is killed leaves the cursor visible"
    assert output.rindex("\x1b[?25h") > output.rfind("\x1b[?25l"), "the cursor is visible"


def test_alerts_are_red_and_so_are_anomalies_after_which_something_was_done() -> None:
    file = io.StringIO()
    live = LiveLine(file)
    live.on_event(AlertFired(step=3, alert="loss > 5", value=7.0, text="loss > 5: loss is 7"))
    for policy in ("warn", "skip"):
        live.on_event(AnomalySeen(step=4, kind="loss_spike", what="9 is much", policy=policy, rank=1))
    live.on_event(AnomalyOver(step=9, kind="loss_spike", what="9 is no more"))
    red, yellow, red_too, dim = file.getvalue().splitlines()
    assert "\x1b[1;31malert: loss > 5: loss is 7" in red
    assert "\x1b[33mloss spike: 9 is much, rank 1, run goes on" in yellow
    assert "\x1b[1;31mloss spike: 9 is much, rank 1, step skipped" in red_too
    assert "9 is no more" in dim
