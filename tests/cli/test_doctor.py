from __future__ import annotations

import json

import pytest

from trainfleet.cli import doctor as cli
from trainfleet.cli.main import main
from trainfleet.doctor import examination
from trainfleet.doctor.finding import Finding

FINE = Finding(subject="Python", fact="3.11")
SLOW = Finding(subject="disk", fact="4 GiB", verdict="note", remedy="Remove runs.")
BROKEN = Finding(subject="loopback", fact="closed", verdict="no", remedy="Open it.")


def doctor(monkeypatch, capsys, *findings, options=()) -> tuple[int, str]:
    monkeypatch.setattr(examination, "examine_machine", lambda quick: iter(findings))
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


def test_what_will_work_is_told_apart_and_decides_nothing(monkeypatch, capsys):
    rows = [Finding(subject=name, fact="", verdict=how, outlook=True) for name, how in (("JAX", "off"), ("GPUs", "no"))]
    code, said = doctor(monkeypatch, capsys, FINE, *rows)
    assert code == 0 and said.count("What will work here:") == 1 and said.index("Python") < said.index("What will")
    assert "  -   JAX" in said and "  NO  GPUs" in said and said.endswith("Everything that was tried works.\n")


def test_a_pipe_gets_no_colours(monkeypatch, capsys):
    assert "\x1b" not in doctor(monkeypatch, capsys, FINE, SLOW, BROKEN)[1]


@pytest.mark.parametrize(("what", "run"), [("cpu-0:7700", False), ("ports", False), ("runs/never", True), ("{}", True)])
def test_a_folder_is_a_run_and_an_address_is_none(what, run, tmp_path):
    assert cli._is_run([what.format(tmp_path)]) is run
