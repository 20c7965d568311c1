"""A failing rank says what happened, and the cause is told from what followed from it."""

from __future__ import annotations

import json
import signal
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from trainfleet.comm.environment import RankEnvironment
from trainfleet.errors import PeerError, PlanError
from trainfleet.training.ranks.failure import (
    UNGUARDED,
    Failure,
    cause_of,
    death_of,
    describe,
    failure_from_json,
    leave_report,
    read_failures,
    reported_failures,
)

RANK_1 = RankEnvironment(rank=1, world_size=4)


def raised(exc: Exception) -> Exception:
    try:
        raise exc
    except Exception as caught:
        return caught


def test_a_report_has_rank_line_cause_and_code() -> None:
    failure = describe(raised(PlanError("tp=3 does not divide 8.", hint="Use 4.")), RANK_1)
    assert (failure.rank, failure.exit_code, failure.hint) == (1, PlanError.exit_code, "Use 4.")
    assert "test_failure.py:" in failure.sentence and failure.sentence.endswith("tp=3 does not divide 8.")
    assert str(failure.error()).startswith("Rank 1 of 4 on ")
    assert failure.error().exit_code == PlanError.exit_code
    assert "raised" in str(failure.error().__cause__), "the traceback is kept for --debug"


def test_a_foreign_error_names_its_kind_and_has_the_general_code() -> None:
    failure = describe(raised(ZeroDivisionError("division by zero")), RANK_1)
    assert "ZeroDivisionError: division by zero" in failure.sentence
    assert failure.exit_code == 10


def test_the_cause_is_the_first_that_did_not_follow_from_another() -> None:
    lost_peer = replace(describe(raised(PeerError("rank 0 is gone")), RANK_1), time=1.0)
    real = replace(describe(raised(ValueError("wrong")), RANK_1), time=2.0)
    later = replace(describe(raised(ValueError("later")), RANK_1), time=3.0)
    assert lost_peer.consequence and not real.consequence
    assert cause_of([later, lost_peer, real]) is real
    assert cause_of([lost_peer]) is lost_peer, "better than nothing"


@pytest.mark.parametrize(
    ("code", "said", "hint"),
    [
        (-signal.SIGKILL, "killed by SIGKILL", "memory"),
        (-signal.SIGSEGV, "killed by SIGSEGV", "PYTHONFAULTHANDLER"),
        (3, "exit code 3", "output"),
        (UNGUARDED, "launch() again", "__main__"),
    ],
)
def test_a_death_without_a_report_is_put_in_words(code: int, said: str, hint: str) -> None:
    failure = death_of(2, 4, code, stopped=False)
    assert said in failure.sentence
    assert failure.hint is not None and hint in failure.hint


def test_reports_travel_as_json_and_are_found_below_a_folder(tmp_path: Path) -> None:
    failure = death_of(0, 2, -9, stopped=True)
    assert failure_from_json(json.dumps(asdict(failure))) == failure
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "failure.json").write_text(json.dumps(asdict(failure)))
    assert read_failures(tmp_path) == [failure]


def test_a_rank_of_ours_leaves_its_report_and_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = replace(RANK_1, launcher="trainfleet", error_file=str(tmp_path / "error.json"))
    monkeypatch.setattr(RankEnvironment, "from_env", classmethod(lambda cls: ours))
    with pytest.raises(SystemExit) as ended, reported_failures():
        raise PlanError("no")
    assert ended.value.code == PlanError.exit_code
    assert [type(each) for each in read_failures(tmp_path)] == [Failure]


def test_a_report_is_left_for_whoever_comes_later(tmp_path: Path) -> None:
    failure = Failure(
        rank=1, world_size=2, host="h", time=0.0, sentence="failed.", exit_code=1, hint="Look.", traceback="line 3"
    )
    path = leave_report(tmp_path, failure.error())
    assert path == tmp_path / "failure.txt"
    text = path.read_text()
    assert "Rank 1 of 2 on h failed." in text and "Look." in text and "line 3" in text
    assert leave_report(tmp_path / "nowhere", failure.error()) is None
