"""A terminal sees how far it has come and nothing when it is over; a pipe sees nothing."""

from __future__ import annotations

import io

import pytest

from trainfleet.cli import progress
from trainfleet.cli.progress import Progress


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
