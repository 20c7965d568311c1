from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainfleet.config.yaml import inline_yaml, parse_value, read_yaml, to_yaml
from trainfleet.errors import ConfigError
from trainfleet.plan import Plan


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("off", "off"),
        ("yes", "yes"),
        ("none", "none"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("1e-3", 0.001),
        ("1E4", 10000.0),
        (".5", 0.5),
        ("010", 10),
        ("0x1f", 31),
        ("1_000", "1_000"),
        ("true", True),
        ("~", None),
        ("", None),
        ("[1, a]", [1, "a"]),
        ("{a: 1}", {"a": 1}),
        ("'3'", "3"),
        ('"a b"', "a b"),
        ("-", "-"),
        ("*.csv", "*.csv"),
        ("[x", "[x"),
        ("a: b", "a: b"),
        ("- a", "- a"),
        ("abc #1", "abc #1"),
        ("@x", "@x"),
    ],
)
def test_a_value_on_the_command_line_means_what_it_looks_like(text, value):
    got = parse_value(text)
    assert got == value and type(got) is type(value)


def test_every_key_has_its_line_also_below_an_anchor():
    text = "a: &x\n  b: 1\n\nc:\n  <<: *x\n  d: {e: 2}\n"
    value, lines = read_yaml(text, "f.yaml")
    assert value == {"a": {"b": 1}, "c": {"b": 1, "d": {"e": 2}}}
    assert lines == {("a",): 1, ("a", "b"): 2, ("c",): 4, ("c", "b"): 2, ("c", "d"): 6, ("c", "d", "e"): 6}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a:\n  b: 1\n  b: 2\n", r"^a\.b stands twice in f\.yaml, in lines 2 and 3"),
        ("a: [1\n", r"^f\.yaml:2 is not YAML"),
        ("a: 1\n b: 2\n", r"^f\.yaml:2 is not YAML"),
        ("a: !!python/object/apply:os.system ['true']\n", r"^f\.yaml:1 is not YAML: could not determine a constructor"),
        ("a: &x\n  b: *x\n", r"^f\.yaml:\d holds itself"),
        ("a: \x00\n", r"^f\.yaml is not YAML"),
        ("? [1, 2]\n: 3\n", r"^f\.yaml:1 is not YAML: found unhashable key"),
        ("? {a: 1}\n: 3\n", r"^f\.yaml:1 is not YAML: found unhashable key"),
    ],
)
def test_what_is_not_a_recipe_is_said_with_its_line(text, said):
    with pytest.raises(ConfigError, match=said):
        read_yaml(text, "f.yaml")


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=200)
@given(plain)
def test_plain_values_read_back_as_the_same(value):
    assert read_yaml(to_yaml({"a": value}), "f")[0] == {"a": value}
    assert read_yaml("a: " + inline_yaml(value), "f")[0] == {"a": value}


@pytest.mark.parametrize(
    "text", ["1e-3", "0o17", "1E5", "off", "1:30", "2024-01-01", "null", "true", "<<", "=", "#", "- a"]
)
def test_texts_that_look_like_something_else_are_quoted(text):
    assert read_yaml(to_yaml({"a": text}), "f")[0] == {"a": text}


def test_dataclasses_paths_durations_and_names_become_plain():
    text = to_yaml({"plan": Plan(blocks=("A",)), "path": Path("a"), "wait": timedelta(seconds=5), "cls": Plan})
    value = read_yaml(text, "f")[0]
    assert value["plan"]["blocks"] == ["A"] and value["plan"]["loss_scale"]["window"] == 2000
    assert (value["path"], value["wait"], value["cls"]) == ("a", 5.0, "trainfleet.plan:Plan")


def test_what_yaml_cannot_hold_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"^model is <object object.* a object, which YAML cannot hold"):
        to_yaml({"model": object()})
