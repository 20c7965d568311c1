from __future__ import annotations

import subprocess
import sys

import pytest

from trainfleet.cli import doctor
from trainfleet.cli.main import app, main
from trainfleet.errors import ConfigError, OutOfMemory


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return int(ended.value.code or 0)


@pytest.fixture
def failing(monkeypatch):
    """Makes `trainfleet doctor` fail with a given exception."""

    def fail_with(error: BaseException) -> None:
        def fail(*_: object):
            raise error

        monkeypatch.setattr(doctor, "_findings", fail)

    return fail_with


def test_an_error_is_a_sentence_a_hint_and_its_code(failing, capsys):
    failing(OutOfMemory("Rank 1 is out of memory.", hint="Set plan.recompute to blocks."))
    assert run("doctor") == 11
    captured = capsys.readouterr()
    assert captured.err == "trainfleet: Rank 1 is out of memory.\n  Set plan.recompute to blocks.\n"
    assert captured.out == ""


@pytest.mark.parametrize("arguments", [("--debug", "doctor"), ("doctor", "--debug")])
def test_debug_shows_the_traceback_wherever_it_stands(failing, capsys, arguments):
    failing(ConfigError("x is 1."))
    assert run(*arguments) == 2
    said = capsys.readouterr().err
    assert "Traceback" in said and said.endswith("trainfleet: x is 1.\n")


def test_ctrl_c_ends_with_130(failing, capsys):
    failing(KeyboardInterrupt())
    assert run("doctor") == 130


def test_a_defect_is_not_dressed_up(failing):
    failing(ZeroDivisionError("a defect"))
    with pytest.raises(ZeroDivisionError):
        main(["doctor"])


def test_an_unknown_verb_or_option_ends_with_2(capsys):
    assert run("trian") == 2
    assert "trian" in capsys.readouterr().err
    assert run("doctor", "--fast") == 2


def test_the_version_is_told(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out.startswith("trainfleet 0.")


def test_help_imports_nothing_heavy():
    """Under 0.4 s: benchmarks/startup.py measures; this says what must not come back."""
    program = (
        "import sys, trainfleet.cli.main\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'yaml', 'rich', 'psutil'} & set(sys.modules)\n"
        "raise SystemExit(f'{sorted(heavy)}' if heavy else 0)"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0


def test_every_verb_has_a_help_of_one_line():
    for command in app.registered_commands:
        assert command.callback is not None
        assert len((command.callback.__doc__ or "").splitlines()[0]) < 70
