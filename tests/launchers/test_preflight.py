"""What hosts say of themselves becomes one sentence, with the remedy."""

from __future__ import annotations

from typing import Any

import pytest

from trainfleet.errors import LaunchError, PeerError
from trainfleet.launchers.preflight import Answer, check_answers
from trainfleet.launchers.probe import Probe

NOW = 1_000_000.0


def answer(host: str, *, ahead: float = 0.0, took: float = 0.2, **changes: Any) -> Answer:
    """Of a host whose clock is so far ahead, asked now, in the middle of so many seconds."""
    said: dict[str, Any] = {
        "hostname": host, "time": NOW + took / 2 + ahead, "versions": {"torch": "2.1"}, "knows_first": True,
        "recipe": True, "port_is_free": True, **changes,
    }  # fmt: skip
    return Answer(host=host, probe=Probe(**said), asked=NOW, answered=NOW + took)


def check(*answers: Answer) -> list[str]:
    return check_answers(answers, first="a", port=4000, recipe="r.yaml", directory="/srv/code")


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"recipe": False}, LaunchError, "b has no file r.yaml in /srv/code"),
        ({"knows_first": False}, LaunchError, "b does not know the name a, where the hosts are to meet"),
        ({"port_is_free": False}, LaunchError, "Port 4000 of b is in use"),
        ({"versions": {"torch": "2.2"}}, PeerError, "b has torch 2.2, but a has torch 2.1. Use the same everywhere"),
    ],
)
def test_what_keeps_a_run_from_starting_is_said(changes: dict[str, Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        check(answer("a"), answer("b", **changes))


def test_hosts_that_are_well_pass_in_silence() -> None:
    assert check(answer("a"), answer("b", ahead=4.0), answer("c", ahead=-4.0)) == []


@pytest.mark.parametrize(("ahead", "words"), [(60.0, "60 s ahead of"), (-60.0, "60 s behind")])
def test_a_clock_that_is_wrong_is_remarked(ahead: float, words: str) -> None:
    (remark,) = check(answer("a"), answer("b", ahead=ahead), answer("c"))
    assert remark.startswith(f"The clock of b is {words} that of a.")


def test_an_answer_that_took_long_does_not_make_a_clock_wrong() -> None:
    assert check(answer("a"), answer("b", took=30.0)) == []
    assert len(check(answer("a"), answer("b", took=30.0, ahead=60.0))) == 1
