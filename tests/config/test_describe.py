from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest

from trainfleet.config import (
    commented_env,
    commented_yaml,
    configuration_markdown,
    describe,
    json_schema,
    load_config,
)
from trainfleet.config.yaml import read_yaml
from trainfleet.plan import STRICT, LossScale, Plan


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What a run needs."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    name: str = "off"
    """How it is called, a|b."""
    plan: Plan = field(default_factory=lambda: Plan(zero=2, blocks=("Block",)))
    scale: LossScale | None = None
    """An optional section."""


@dataclass(frozen=True, kw_only=True)
class Source:
    path: Path
    """Where."""


@dataclass(frozen=True, kw_only=True)
class Data:
    train: Source
    evaluation: Source | None = None


NOWHERE = Path(os.devnull)


def test_the_commented_yaml_is_the_defaults(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(commented_yaml(Settings))
    assert load_config(Settings, file=path, env={}, dotenv=NOWHERE).value == Settings()
    assert "# Batch normalisation sees the batch" in path.read_text()
    given = read_yaml(path.read_text(), "recipe.yaml")[1]
    assert {".".join(key) for key in given} >= {key.key for key in describe(Settings) if "scale." not in key.key}


def test_an_optional_section_of_the_commented_yaml_can_be_switched_on(tmp_path):
    text = commented_yaml(Settings)
    before, after = text.split("# or, as a section:\n")
    assert after.startswith("# scale:\n#   initial: 65536.0  # number\n")
    uncommented = before.replace("scale: null", "# null") + "\n".join(
        line.removeprefix("# ") for line in after.split("\n")
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(uncommented)
    assert load_config(Settings, file=path, env={}, dotenv=NOWHERE).value.scale == LossScale()


def test_a_required_key_stands_as_a_comment_even_in_an_optional_section():
    text = commented_yaml(Data)
    assert "# train:\n  # Where.\n  # path:  # path\n" in text
    assert "# evaluation:\n#   path:  # path\n" in text


def test_each_line_of_the_commented_env_can_be_switched_on(tmp_path):
    lines = commented_env(Settings).splitlines()
    settings = [line for line in lines if line.startswith("# TRAINFLEET_")]
    assert len(settings) == len(describe(Settings))
    path = tmp_path / ".env"
    for line in settings:
        path.write_text(line.removeprefix("# ") + "\n")
        key = line.removeprefix("# TRAINFLEET_").partition("=")[0].lower().replace("__", ".")
        loaded = load_config(Settings, env={}, dotenv=path)
        assert loaded.sources[key] == str(path)
        assert loaded.value == Settings() or key.startswith("scale.")
    path.write_text("\n".join(lines))
    assert set(load_config(Settings, env={}, dotenv=path).sources.values()) == {"default"}


def test_the_schema_refuses_unknown_keys_and_carries_the_meanings():
    schema = json_schema(Settings)
    assert schema["additionalProperties"] is False
    assert schema["properties"]["name"]["description"] == "How it is called, a|b."
    zero = schema["$defs"]["Plan"]["properties"]["zero"]
    assert zero["enum"] == [0, 1, 2, 3] and zero["description"].startswith("What is split")


def test_the_page_has_one_row_for_each_key():
    page = configuration_markdown(Settings)
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) == len(describe(Settings))
    assert "| `plan.zero` | one of 0, 1, 2, 3 | `2` | What is split" in page
    assert "How it is called, a\\|b." in page
    assert page.count("## `plan`\n") == 1, "a section inside a section does not cut it in two"


@pytest.mark.parametrize("write", [commented_yaml, commented_env, configuration_markdown])
def test_the_same_class_gives_the_same_text(write):
    assert write(Settings) == write(Settings)
