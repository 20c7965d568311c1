from __future__ import annotations

from trainfleet.doctor.run.advice import RESULT, advice


def test_advice_is_a_finding_and_what_it_gains():
    made = advice("data", "it waits", "data.workers=2", gain=0.3)
    assert (made.finding.subject, made.finding.verdict, made.gain) == ("data", "note", 0.3)


def test_a_result_is_worth_more_than_any_time():
    assert RESULT > 1.0
