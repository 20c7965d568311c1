from __future__ import annotations

import json

from trainfleet.doctor import examination
from trainfleet.doctor.examination import CHECKS, examine_machine
from trainfleet.doctor.finding import Finding
from trainfleet.doctor.probe import Tried


def test_every_check_says_something_here_and_nothing_without_remedy(monkeypatch):
    for name, check in CHECKS.items():
        findings = list(check())
        assert findings or name in ("copies", "variables")  # which speak only of what is wrong
        assert all(found.fact and (found.verdict == "ok" or found.remedy) for found in findings)


def test_a_check_that_fails_itself_does_not_hide_the_others(monkeypatch):
    def check_moon():
        raise PermissionError("not allowed")
        yield

    fine = Finding(subject="Python", fact="3.11")
    monkeypatch.setattr(examination, "CHECKS", {"moon": check_moon, "python": lambda: iter([fine])})
    moon, python, *_ = examine_machine(quick=True)
    assert moon.verdict == "note" and moon.subject == "moon" and "PermissionError: not allowed" in moon.fact
    assert python == fine


def test_torch_is_tried_while_the_rest_is_looked_at_and_left_alone_if_quick(monkeypatch):
    about = json.dumps({"version": "2.13.0", "cuda": None, "nccl": None, "gloo": False, "count": 0})
    tried, log = [Tried(returncode=0, output=about + "\n", error="")], []

    class Trial:
        def __init__(self, *, quick: bool) -> None:
            log.append(f"quick={quick}")

        def __enter__(self):
            log.append("begun")
            return lambda: log.append("waited for") or tried

        def __exit__(self, *error: object) -> None:
            log.append("ended")

    monkeypatch.setattr(examination, "torch_tried", Trial)

    def look():
        log.append("looked at")
        yield Finding(subject="disk", fact="fine")

    monkeypatch.setattr(examination, "CHECKS", {"disk": look})
    found = {each.subject: each for each in examine_machine()}
    assert log == ["quick=False", "begun", "looked at", "waited for", "ended"]
    assert found["gloo"].verdict == "no" and found["ranks on CPUs"].outlook
    log.clear()
    assert "--quick" in next(each.fact for each in examine_machine(quick=True) if each.subject == "torch")
    assert "waited for" not in log
