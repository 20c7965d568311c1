from __future__ import annotations

import io
import subprocess
import sys
from typing import Any

from trainfleet.events import Event, Observers
from trainfleet.monitor.console import Console


def test_a_pipe_gets_plain_lines(story: Any) -> None:
    file = io.StringIO()
    console = Console(file, log_interval=20)
    for event in story.run():
        console.on_event(event)
    console.close()
    kinds = [line.split()[0] for line in file.getvalue().splitlines()]
    assert kinds.count("step") == 3 and kinds.count("eval") == 4 and "\x1b" not in file.getvalue()


def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines(monkeypatch: Any, story: Any) -> None:
    class Dumb(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "dumb")
    file = Dumb()
    Console(file).on_event(story.step(1))
    assert file.getvalue().startswith("step")


def test_a_console_that_broke_does_not_stop_the_run(story: Any) -> None:
    seen: list[Event] = []

    class Rest:
        def on_event(self, event: Event) -> None:
            seen.append(event)

    file = io.StringIO()
    observers = Observers([Console(file), Rest()])
    file.close()
    for event in story.run():
        observers.emit(event)
    observers.close()
    assert len(seen) == len(list(story.run()))


def test_a_pipe_needs_no_rich_and_nothing_needs_torch() -> None:
    program = (
        "import sys, trainfleet.monitor as m; m.Console();"
        "assert not {'torch', 'rich', 'matplotlib', 'tensorboard'} & set(sys.modules), 'too much is imported'"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.PIPE)
