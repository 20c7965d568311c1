"""A terminal sees how far it has come and nothing when it is over; a pipe sees nothing."""

from __future__ import annotations

import io

import pytest

from trainfleet.cli import progress
from trainfleet.cli.progress import Progress, RowProgress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(progress, "_PAUSE_SECONDS", -1.0)


def test_a_terminal_is_told_and_left_clean():
    stream = Terminal()
    with Progress("step 20", 4_000_000, stream=stream) as told:
        told.add(1_000_000)
        assert stream.getvalue().startswith("\r\033[Kstep 20  1 MB of 4 MB, ")
    assert stream.getvalue().endswith("\r\033[K")


def test_a_pipe_gets_not_a_word_and_chunks_pass_as_they_are():
    stream = io.StringIO()
    with Progress("x", stream=stream) as told:
        assert list(told.watch([b"ab", b"", b"c"])) == [b"ab", b"", b"c"]
        assert str(told).startswith("x  3 B, ")
    assert stream.getvalue() == ""


def test_rows_have_a_bar_and_a_time_that_is_left(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    stream = Terminal()
    with RowProgress("predict", stream=stream) as told:
        told.tell(5_000, 10_000)  # of which 4,990 were there before
        now[0] += 10
        told.tell(6_000, 10_000)
    last = stream.getvalue().split("\033[K")[-2]
    assert last == "predict  " + "█" * 12 + "░" * 8 + "  6,000 of 10,000 rows, 100/s, 0:40 left\r"
    assert str(RowProgress("x", stream=stream)) == "x  0 rows, 0/s"


def test_rows_of_an_unknown_number_have_none():
    told = RowProgress("validate", stream=io.StringIO())
    told.tell(32, None)
    assert str(told).startswith("validate  32 rows, ")


def test_what_is_logged_takes_the_place_of_the_line(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(progress.sys, "stderr", stream)
    with RowProgress("validate") as told:
        told.tell(32, 64)
        progress.sys.stderr.write("a warning\n")  # in one piece, as logging does
    assert "left\r\033[Ka warning\n" in stream.getvalue() and progress.sys.stderr is stream
