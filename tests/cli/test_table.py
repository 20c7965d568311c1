from __future__ import annotations

import json
import math

import pytest

from trainfleet.cli.table import print_json, print_table


def test_numbers_stand_to_the_right_and_empty_columns_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("run", "steps", "none", "end"), [("a", "5", "", "x"), ("bcde", "500", "", "")], right={"steps"})
    assert capsys.readouterr().out == "run   steps  end\na         5  x\nbcde    500\n"
    print_table(("run",), [])
    assert capsys.readouterr().out == ""


def test_json_is_strict(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": [math.nan, 1, None], 2: b"x"})
    assert json.loads(capsys.readouterr().out) == {"a": ["nan", 1, None], "2": "b'x'"}
