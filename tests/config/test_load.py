from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest

from trainfleet.config import Loaded, load_config, to_yaml
from trainfleet.errors import ConfigError, PlanError
from trainfleet.plan import STRICT, Plan

NOWHERE = Path(os.devnull)


@dataclass(frozen=True, kw_only=True, slots=True)
class Optimizer:
    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    lr: float = 1e-3
    options: dict[str, Any] = field(default_factory=dict)
    betas: tuple[float, float] = (0.9, 0.99)


@dataclass(frozen=True, kw_only=True, slots=True)
class Retention:
    last: int = 3
    every: int | None = None

    def __post_init__(self) -> None:
        if self.last < 1:
            raise ConfigError(f"retention.last is {self.last}; keep at least 1.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    name: str = "run"
    steps: int = 10
    plan: Plan = field(default_factory=lambda: Plan(zero=2))
    optimizer: Optimizer = field(default_factory=Optimizer)
    retention: Retention | None = None


def load(*overrides: str, yaml: str = "", folder: Path | None = None, **sources: Any) -> Loaded[Settings]:
    file = None
    if folder is not None:
        file = folder / "recipe.yaml"
        file.write_text(yaml)
    return load_config(Settings, file=file, overrides=overrides, **{"env": {}, "dotenv": NOWHERE, **sources})


def sentence(*overrides: str, **sources: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*overrides, **sources)
    return str(caught.value)


def test_nothing_given_is_the_default_of_everything():
    loaded = load()
    assert loaded.value == Settings()
    assert set(loaded.sources.values()) == {"default"}
    assert "plan.loss_scale.initial" in loaded.sources


def test_each_source_beats_the_one_before(tmp_path):
    dotenv = tmp_path / "site.env"
    yaml = "steps: 1\n"
    sources: dict[str, Any] = {"yaml": yaml, "folder": tmp_path}
    assert load(**sources).value.steps == 1
    dotenv.write_text("TRAINFLEET_STEPS=2\nOTHER=x\n")
    sources["dotenv"] = dotenv
    assert load(**sources).value.steps == 2
    sources["env"] = {"TRAINFLEET_STEPS": "3"}
    assert load(**sources).value.steps == 3
    assert load("steps=4", **sources).value.steps == 4
    assert load("steps=4", "steps=5", **sources).value.steps == 5
    assert load("steps=4", **sources, values={"steps": 6}).value.steps == 6


def test_the_winner_of_each_key_is_remembered_with_its_line(tmp_path):
    dotenv = tmp_path / "site.env"
    dotenv.write_text("TRAINFLEET_OPTIMIZER__LR=1e-4\n")
    loaded = load(
        "optimizer.options.width=3",
        yaml="plan:\n  zero: 3\n\nname: x\noptimizer: {lr: 1}\n",
        folder=tmp_path,
        dotenv=dotenv,
        env={"TRAINFLEET_RETENTION__LAST": "7"},
        values={"steps": 4},
    )
    sources = loaded.sources
    assert sources["plan.zero"] == f"{tmp_path}/recipe.yaml:2"
    assert sources["name"] == f"{tmp_path}/recipe.yaml:4"
    assert sources["optimizer.lr"] == str(dotenv)
    assert sources["retention.last"] == "environment TRAINFLEET_RETENTION__LAST"
    assert sources["optimizer.options.width"] == "command line"
    assert sources["steps"] == "python"
    assert sources["plan.precision"] == sources["retention.every"] == "default"
    assert loaded.value.retention == Retention(last=7)


def test_the_env_file_of_the_working_directory_is_read_when_none_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load(dotenv=None).value.steps == 10
    (tmp_path / ".env").write_text("TRAINFLEET_STEPS=77\n")
    loaded = load(dotenv=None)
    assert (loaded.value.steps, loaded.sources["steps"]) == (77, ".env")


def test_the_environment_of_the_process_is_read_when_none_is_given(monkeypatch):
    monkeypatch.setenv("TRAINFLEET_PLAN__PRECISION", "bf16")
    assert load(env=None).value.plan.precision == "bf16"


def test_a_section_keeps_the_rest_of_its_own_default():
    assert load("plan.precision=bf16").value.plan == Plan(zero=2, precision="bf16")


def test_mappings_merge_key_by_key_and_single_values_replace():
    values = {"optimizer": {"options": {"a": 1, "b": {"c": 2}}}}
    merged = load_config(Settings, values={**values, "optimizer.options.b.d": 3}, env={}, dotenv=NOWHERE).value
    assert merged.optimizer.options == {"a": 1, "b": {"c": 2, "d": 3}}
    assert load("optimizer.options={a: 1}", "optimizer.options.a=[1]").value.optimizer.options == {"a": [1]}


def test_a_section_named_with_nothing_below_stays_at_its_defaults(tmp_path):
    assert load(yaml="plan:\nretention:\n", folder=tmp_path).value == Settings()
    assert load("retention.last=4", "retention=null").value.retention is None
    assert load("retention={}").value.retention == Retention()


def test_a_built_section_is_taken_as_it_is():
    loaded = load(values={"plan": Plan(zero=3, offload="parameters")})
    assert loaded.value.plan == Plan(zero=3, offload="parameters")
    assert loaded.sources["plan.zero"] == "python"


@pytest.mark.parametrize(
    ("override", "allowed"),
    [
        ("steps=true", "steps is true (command line); allowed: whole number."),
        ("steps=2.5", "steps is 2.5 (command line); allowed: whole number."),
        ("steps=", "steps is null (command line); allowed: whole number."),
        ("plan.zero=7", "plan.zero is 7 (command line); allowed: one of 0, 1, 2, 3."),
        ("plan.zero=true", "plan.zero is true (command line); allowed: one of 0, 1, 2, 3."),
        ("plan.compile=1", "plan.compile is 1 (command line); allowed: true or false."),
        ("plan.dp_shard=two", "plan.dp_shard is 'two' (command line); allowed: whole number or null."),
        ("plan.blocks=Block", "plan.blocks is 'Block' (command line); allowed: list of text."),
        ("plan=3", "plan is 3 (command line); allowed: section."),
        ("retention=3", "retention is 3 (command line); allowed: section or null."),
    ],
)
def test_a_wrong_value_is_one_sentence_with_value_source_and_what_is_allowed(override, allowed):
    assert sentence(override) == allowed


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("plan.zer", "did you mean plan.zero?"),
        ("lr", "did you mean optimizer.lr?"),
        ("optimizer.zero", "did you mean plan.zero?"),
        ("stepz", "did you mean steps?"),
        ("plan.loss_scale.intial", "did you mean plan.loss_scale.initial?"),
        ("pln.zero", "did you mean plan?"),
        ("qqqq", "the top level has name, steps, plan, optimizer, retention."),
        ("optimizer.qqqq", "optimizer has lr, options, betas."),
    ],
)
def test_an_unknown_key_names_the_nearest(key, near):
    said = sentence(f"{key}=1")
    assert said.startswith("There is no key ") and said.endswith(near)


def test_an_unknown_variable_is_refused_but_those_of_other_tools_are_not():
    assert "environment TRAINFLEET_PLAN__ZERRO" in sentence(env={"TRAINFLEET_PLAN__ZERRO": "1"})
    assert "TRAINFLEET_PLAN__ZERO" in sentence(env={"TRAINFLEET_PLAN_ZERO": "1"})
    assert load(env={"TRAINFLEET_RUN_ID": "7", "PLAN__ZERO": "x", "HOME": "/"}).value == Settings()


def test_all_that_is_wrong_is_said_at_once_each_on_its_line(tmp_path):
    said = sentence("plan.zero=9", "retention.last=0", "lr=3", yaml="steps: many\n", folder=tmp_path)
    first, *lines = said.split("\n")
    assert first == "4 things are wrong:"
    assert [line.split()[0] for line in lines] == ["There", "steps", "plan.zero", "retention.last"]
    assert f"({tmp_path}/recipe.yaml:1)" in lines[1]


def test_an_error_of_a_section_surfaces_as_it_is_and_says_where_its_keys_come_from():
    with pytest.raises(PlanError) as caught:
        load("plan.zero=0", env={"TRAINFLEET_PLAN__DP_SHARD": "2"})
    assert str(caught.value).startswith("plan.zero is 0, which shards nothing")
    hint = "Where from: plan.zero (command line), plan.dp_shard (environment TRAINFLEET_PLAN__DP_SHARD)."
    assert caught.value.hint == hint


def test_a_missing_key_is_said_with_its_meaning():
    @dataclass(frozen=True, kw_only=True)
    class Needs:
        steps: int
        """How many."""

    with pytest.raises(ConfigError, match=r"^steps is missing; allowed: whole number\. How many\.$"):
        load_config(Needs, env={}, dotenv=NOWHERE)


def test_a_file_that_is_not_there_names_those_that_are(tmp_path):
    (tmp_path / "gpt.yaml").touch()
    with pytest.raises(ConfigError, match=r"no file .*missing\.yaml.* holds gpt\.yaml"):
        load_config(Settings, file=tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(Settings, file=tmp_path)
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="holds a list, not sections"):
        load_config(Settings, file=tmp_path / "list.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9\n")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(Settings, file=tmp_path / "latin.yaml")
    with pytest.raises(ConfigError, match=r"x\.env cannot be read: No such file"):
        load_config(Settings, dotenv=tmp_path / "x.env")


def test_a_resolved_recipe_reads_back_as_the_same(tmp_path):
    loaded = load("plan.blocks=[Block, 'off']", "retention.every=5", "name=1e-3", "optimizer.options={a: [1, x]}")
    assert load(yaml=to_yaml(loaded.value), folder=tmp_path).value == loaded.value
