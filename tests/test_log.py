from __future__ import annotations

import logging

import pytest

from trainfleet import log


@pytest.fixture(autouse=True)
def as_before():
    """Logging as it was, whatever a test sets up."""
    logger = logging.getLogger("trainfleet")
    before = (list(logger.handlers), logger.level, logger.propagate)
    yield
    logger.handlers, logger.propagate = before[0], before[2]
    logger.setLevel(before[1])


def said(capsys) -> list[str]:
    logging.getLogger("trainfleet.data.loader").info("opened %d files", 3)
    logging.getLogger("trainfleet.data.loader").warning("slow disk")
    logging.getLogger("trainfleet.data.loader").debug("details")
    captured = capsys.readouterr()
    assert captured.out == ""
    return [line.split(" ", 1)[1] for line in captured.err.splitlines()]


def test_one_process_speaks_plainly(capsys):
    log.setup()
    assert said(capsys) == ["opened 3 files", "WARNING trainfleet.data.loader: slow disk"]


def test_several_ranks_are_marked_and_only_the_first_speaks_of_the_usual(capsys):
    log.setup("info", 0, 2)
    assert said(capsys)[0] == "[0] opened 3 files"
    log.setup("info", 1, 2)
    assert said(capsys) == ["[1] WARNING trainfleet.data.loader: slow disk"]
    log.setup("debug", 1, 2)
    assert len(said(capsys)) == 3


def test_a_second_call_replaces_the_first(capsys):
    log.setup()
    log.setup("warning")
    assert said(capsys) == ["WARNING trainfleet.data.loader: slow disk"]


def test_the_root_logger_is_left_alone():
    root = logging.getLogger()
    before = (list(root.handlers), root.level)
    log.setup("debug")
    assert (list(root.handlers), root.level) == before
