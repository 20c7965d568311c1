from __future__ import annotations

import pytest

from trainfleet.config.sources import Given, from_dotenv, from_file, from_overrides, from_values, from_variables
from trainfleet.errors import ConfigError

KEYS = ("seed", "plan.zero", "data.path")


def test_an_override_is_a_dotted_key_with_a_yaml_value():
    assert list(from_overrides(["plan.zero=2", "data.path=a=b"])) == [
        Given(("plan", "zero"), 2, "command line", "2"),
        Given(("data", "path"), "a=b", "command line", "a=b"),
    ]
    assert [g.path for g in from_overrides(["plan={zero: 1, loss_scale: {window: 5}}"])] == [
        ("plan", "zero"),
        ("plan", "loss_scale", "window"),
    ]


@pytest.mark.parametrize("override", ["plan.zero", "=3", " =3", "--zero"])
def test_what_is_no_override_is_refused_with_an_example(override):
    with pytest.raises(ConfigError, match=r"Write section\.key=value"):
        list(from_overrides([override]))


def test_variables_name_sections_by_two_underscores_in_any_case_of_letters():
    variables = {"TRAINFLEET_PLAN__ZERO": "3", "TRAINFLEET_SEED": "1", "TRAINFLEET_JOB": "x", "PATH": "y"}
    given = list(from_variables(variables, KEYS, "environment {name}"))
    assert [(g.path, g.value, g.source) for g in given] == [
        (("plan", "zero"), 3, "environment TRAINFLEET_PLAN__ZERO"),
        (("seed",), 1, "environment TRAINFLEET_SEED"),
    ]


def test_a_single_underscore_where_two_belong_is_refused_not_ignored():
    with pytest.raises(ConfigError, match="TRAINFLEET_DATA__PATH"):
        list(from_variables({"TRAINFLEET_DATA_PATH": "x"}, KEYS, "environment {name}"))


def test_an_env_file_keeps_quotes_comments_and_dollars_as_they_are_meant(tmp_path):
    path = tmp_path / ".env"
    path.write_text("# remark\nexport TRAINFLEET_SEED=3\nTRAINFLEET_DATA__PATH='a b/$HOME' # remark\nEMPTY=\n")
    assert from_dotenv(path) == {"TRAINFLEET_SEED": "3", "TRAINFLEET_DATA__PATH": "a b/$HOME", "EMPTY": ""}


def test_an_env_file_that_is_not_text_is_one_sentence(tmp_path):
    (tmp_path / ".env").write_bytes(b"A=\xff\n")
    with pytest.raises(ConfigError, match="cannot be read: it is not UTF-8 text"):
        from_dotenv(tmp_path / ".env")
    with pytest.raises(ConfigError, match="cannot be read"):
        from_dotenv(tmp_path)


def test_python_values_may_be_nested_or_dotted():
    given = list(from_values({"plan.zero": 1, "data": {"path": "x", "options": {}}}))
    assert [(g.path, g.value) for g in given] == [
        (("plan", "zero"), 1),
        (("data", "path"), "x"),
        (("data", "options"), {}),
    ]


def test_an_empty_file_gives_nothing(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")
    assert list(from_file(tmp_path / "empty.yaml")) == []
