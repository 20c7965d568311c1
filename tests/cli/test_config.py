from __future__ import annotations

import json

import pytest

from trainfleet.cli.main import main
from trainfleet.config import load_config
from trainfleet.training.recipe import Recipe

RECIPE = "model: {name: 'gpt:GPT'}\ndata:\n  source: csv\nplan:\n  zero: 2\n"


@pytest.fixture(autouse=True)
def recipe(tmp_path, monkeypatch):
    """A folder with a recipe, and no settings from anywhere else."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_text(RECIPE)
    return tmp_path / "x.yaml"


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["config", *arguments])
    return int(ended.value.code or 0)


def test_show_says_which_source_won(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TRAINFLEET_TRAIN__STEPS", "7")
    (tmp_path / ".env").write_text("TRAINFLEET_TRAIN__SEED=5\nTRAINFLEET_TRAIN__STEPS=6\n")
    assert run("show", "x.yaml", "plan.precision=bf16", "optimizer.args.weight_decay=0.1") == 0
    rows = {row[0]: row[1:] for row in (line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines())}
    assert rows["plan.zero"] == ["2", "x.yaml:5"]
    assert rows["train.seed"] == ["5", ".env"]
    assert rows["train.steps"] == ["7", "environment TRAINFLEET_TRAIN__STEPS"]
    assert rows["plan.precision"] == ["bf16", "command line"]
    assert rows["optimizer.args.weight_decay"] == ["0.1", "command line"]
    assert rows["folder"] == ["runs/run", "default"]


def test_show_may_leave_out_defaults(capsys):
    assert run("show", "x.yaml", "--changed", "train.steps=3") == 0
    keys = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert keys == ["model.name", "data.source", "plan.zero", "train.steps"]


def test_show_as_yaml_is_a_recipe_that_gives_the_same(capsys, tmp_path):
    assert run("show", "x.yaml", "--yaml", "train.observers=[a:B]") == 0
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(capsys.readouterr().out)
    given = load_config(Recipe, file=tmp_path / "x.yaml", overrides=["train.observers=[a:B]"]).value
    assert load_config(Recipe, file=resolved).value == given


def test_a_wrong_recipe_ends_with_2_and_names_line_and_remedy(capsys, recipe):
    recipe.write_text(RECIPE + "  zerro: 3\n")
    assert run("show", "x.yaml") == 2
    assert capsys.readouterr().err == "trainfleet: There is no key plan.zerro (x.yaml:6); did you mean plan.zero?\n"
    assert run("show", "y.yaml") == 2
    assert "There is no file y.yaml. This folder holds x.yaml." in capsys.readouterr().err


def test_an_impossible_plan_ends_with_3(capsys):
    assert run("show", "x.yaml", "plan.offload=parameters") == 3
    assert "Where from: plan.zero (x.yaml:5), plan.offload (command line)." in capsys.readouterr().err


def test_init_writes_what_loads_once_the_required_keys_are_there(capsys, tmp_path):
    assert run("init", "new") == 0
    written = tmp_path / "new" / "recipe.yaml"
    assert (tmp_path / "new" / ".env").exists()
    loaded = load_config(Recipe, file=written, overrides=["model.name=a:b", "data.source=csv"]).value
    assert loaded == load_config(Recipe, overrides=["model.name=a:b", "data.source=csv"]).value


def test_init_replaces_nothing_unless_told(capsys, tmp_path):
    (tmp_path / "recipe.yaml").write_text("mine")
    assert run("init") == 2
    assert "recipe.yaml would be replaced." in capsys.readouterr().err
    assert (tmp_path / "recipe.yaml").read_text() == "mine" and not (tmp_path / ".env").exists()
    assert run("init", "--force") == 0
    assert (tmp_path / "recipe.yaml").read_text() != "mine"


def test_a_folder_that_cannot_be_written_is_one_sentence(capsys, tmp_path):
    (tmp_path / "file").touch()
    assert run("init", "file") == 2
    assert "cannot be written: file is a file, not a folder." in capsys.readouterr().err


def test_schema_and_docs_go_to_the_screen_or_a_file(capsys, tmp_path):
    assert run("schema") == 0
    assert "plan" in json.loads(capsys.readouterr().out)["properties"]
    assert run("docs", "-o", str(tmp_path / "deep" / "page.md")) == 0
    assert (tmp_path / "deep" / "page.md").read_text().startswith("# Configuration\n")
