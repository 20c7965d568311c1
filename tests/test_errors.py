from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest

from trainfleet import errors
from trainfleet.errors import TrainfleetError

TREE = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, TrainfleetError)]
PAGE = Path(__file__).parents[1] / "docs" / "exit_codes.md"


@pytest.mark.parametrize("cls", TREE)
def test_an_error_crosses_processes_with_its_class_and_hint(cls):
    again = pickle.loads(pickle.dumps(cls("a sentence", hint="a remedy")))
    assert (type(again), str(again), again.hint) == (cls, "a sentence", "a remedy")


def test_the_tree_drawn_in_the_docstring_is_the_tree():
    drawn = {name: int(code) for name, code in re.findall(r"([A-Z]\w+) +(\d+) ", errors.__doc__ or "")}
    assert drawn == {cls.__name__: cls.exit_code for cls in TREE}


def test_the_page_of_exit_codes_is_the_tree():
    rows = re.findall(r"^\| (\d+) \| `(\w+)`", PAGE.read_text(), re.MULTILINE)
    assert {name: int(code) for code, name in rows} == {cls.__name__: cls.exit_code for cls in TREE}


def test_no_error_of_ours_is_one_of_pythons():
    """pydantic and argument parsers swallow ValueError; ours must come through."""
    assert not any(issubclass(cls, ValueError | TypeError | OSError | TimeoutError) for cls in TREE)
