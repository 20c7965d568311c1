from __future__ import annotations

import json

import pytest

from trainfleet.cli.main import main
from trainfleet.doctor import accelerators, machine
from trainfleet.doctor.finding import Finding

FINE = Finding(subject="Python", fact="3.11")
SLOW = Finding(subject="disk", fact="4 GiB", verdict="note", remedy="Remove runs.")
BROKEN = Finding(subject="loopback", fact="closed", verdict="no", remedy="Open it.")


def doctor(monkeypatch, capsys, *findings, options=()) -> tuple[int, str]:
    monkeypatch.setattr(machine, "CHECKS", (lambda: iter(findings),))
    monkeypatch.setattr(accelerators, "check_torch", lambda: iter(()))
    with pytest.raises(SystemExit) as ended:
        main(["doctor", *options])
    return int(ended.value.code or 0), capsys.readouterr().out


def test_all_is_well_ends_with_0_and_something_broken_with_1(monkeypatch, capsys):
    code, said = doctor(monkeypatch, capsys, FINE, SLOW)
    assert code == 0 and "-> Remove runs." in said and said.endswith("Everything that was tried works.\n")
    code, said = doctor(monkeypatch, capsys, FINE, BROKEN)
    assert code == 1 and "  NO  loopback" in said and said.endswith("Does not work: loopback.\n")


def test_programs_get_json(monkeypatch, capsys):
    code, said = doctor(monkeypatch, capsys, FINE, BROKEN, options=["--json"])
    assert code == 1
    assert [finding["verdict"] for finding in json.loads(said)] == ["ok", "no"]


def test_a_check_that_fails_itself_does_not_hide_the_others(monkeypatch, capsys):
    def check_moon():
        raise PermissionError("not allowed")
        yield

    monkeypatch.setattr(accelerators, "check_torch", lambda: iter(()))
    monkeypatch.setattr(machine, "CHECKS", (check_moon, lambda: iter([FINE])))
    with pytest.raises(SystemExit) as ended:
        main(["doctor"])
    said = capsys.readouterr().out
    assert ended.value.code == 0
    assert "note  moon" in said and "PermissionError: not allowed" in said and "Python" in said
