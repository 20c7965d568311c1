from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trainfleet.cli.main import main
from trainfleet.config import load_config
from trainfleet.deps import installed
from trainfleet.errors import ConfigError
from trainfleet.store import FileStore
from trainfleet.training import dry_run, job
from trainfleet.training.ranks import launch
from trainfleet.training.recipe import Recipe

RECIPE = """
folder: run
model: {name: 'tiny:Tiny'}
data: {source: 'tiny:Numbers'}
batch: {micro_batch: 2}
loss: mse
train: {steps: 3}
checkpoint: {every: null}
monitor: {tensorboard: false, curve: false}
"""

TINY = """
import torch
from torch import nn

class Tiny(nn.Linear):
    def __init__(self):
        super().__init__(3, 1)

class Numbers:
    def __len__(self):
        return 64
    def __getitem__(self, index):
        x = torch.full((3,), float(index))
        return {"input": x, "label": x.sum(0, keepdim=True)}
"""


@pytest.fixture(autouse=True)
def recipe(tmp_path, monkeypatch):
    """A recipe in a folder below the working directory, no settings and no launcher from anywhere else."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "PMI_RANK", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "tiny.yaml").write_text(RECIPE)
    (tmp_path / "recipes" / "tiny.py").write_text(TINY)


@pytest.fixture
def calls(monkeypatch):
    """What would have been done, instead of doing it: a list of (function, arguments)."""
    made: list[tuple[str, Any]] = []
    reason = "finished"

    def check(recipe: Recipe, world_size: int) -> list[str]:
        made.append(("check", world_size))
        if recipe.train.steps == 13:
            raise ConfigError("train.steps is 13; that is bad luck.")
        return ["plan    fits"]

    def run(recipe: Recipe) -> Any:
        made.append(("run", recipe))
        return SimpleNamespace(reason="interrupted" if recipe.train.seed == 9 else reason)

    def run_elastic(command: list[str], **options: Any) -> int:
        loaded = load_config(Recipe, file=Path(command[3]), env={}, dotenv=Path(os.devnull)).value
        made.append(("start", {"recipe": loaded, "command": command, **options}))
        return 143 if loaded.train.seed == 9 else 0

    monkeypatch.setattr(dry_run, "check", check)
    monkeypatch.setattr(job, "run", run)
    monkeypatch.setattr(launch, "run_elastic", run_elastic)
    return made


def train(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["train", "recipes/tiny.yaml", *arguments])
    return int(ended.value.code or 0)


def test_one_process_is_this_one(calls):
    assert train("train.steps=4") == 0
    ((did, recipe),) = calls
    assert (did, recipe.train.steps) == ("run", 4)


def test_several_processes_are_checked_before_they_are_started(calls):
    assert train("--nproc", "2", "--nnodes", "3", "--node-rank", "1", "--rendezvous", "a:1", "--max-restarts", "4") == 0
    assert calls[0] == ("check", 6)
    options = calls[1][1]
    assert [options[k] for k in ("nproc", "nnodes", "node_rank", "rendezvous", "max_restarts")] == [2, 3, 1, "a:1", 4]
    calls.clear()
    assert train("--nproc", "2", "train.steps=13") == 2
    assert [did for did, _ in calls] == ["check"]


def test_ranks_get_the_recipe_as_it_was_resolved(calls, monkeypatch):
    monkeypatch.setenv("TRAINFLEET_TRAIN__CLIP_NORM", "0.5")
    assert train("--nproc", "2", "optimizer.lr=1e-3", "optimizer.args={betas: [0.9, 0.95]}") == 0
    started = calls[1][1]
    given = load_config(Recipe, file=Path("recipes/tiny.yaml"), overrides=["optimizer.lr=1e-3"]).value
    assert started["recipe"].optimizer.args == {"betas": [0.9, 0.95]}
    assert started["recipe"].train == given.train and given.train.clip_norm == 0.5
    assert started["command"][1:3] == ["-m", "trainfleet.cli.rank"]
    assert not Path(started["command"][3]).exists(), "the resolved recipe goes with the run"


def test_restarts_need_someone_who_watches(calls):
    assert train("--max-restarts", "1") == 0
    assert [did for did, _ in calls] == ["check", "start"]


def test_a_dry_run_starts_nothing(calls, capsys):
    assert train("--nproc", "4", "--dry-run") == 0
    assert calls == [("check", 4)]
    assert capsys.readouterr().out == "plan    fits\nThe recipe can be trained; nothing was started.\n"
    assert train("--dry-run", "train.steps=13") == 2


def test_resume_is_a_word_for_a_setting(calls, capsys):
    assert train("--resume", "never", "checkpoint.resume=must") == 0
    assert calls[0][1].checkpoint.resume == "never"
    assert train("--resume", "maybe") == 2
    assert "allowed: one of auto, never, must" in capsys.readouterr().err


def test_a_run_that_was_interrupted_ends_with_the_signals_code(calls):
    assert train("train.seed=9") == 130
    assert train("train.seed=9", "--nproc", "2") == 143


def test_a_rank_of_another_launcher_trains_and_starts_nobody(calls, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert train("train.seed=9") == 0, "its launcher would take another code for a failure"
    assert [did for did, _ in calls] == ["run"]
    assert train("--nproc", "2") == 8
    assert "rank 1 of 2" in capsys.readouterr().err


def test_a_process_with_the_number_of_its_host_is_that_hosts_launcher(calls, monkeypatch):
    """One task a node of srun: it is told so, or it would take itself for a rank."""
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert train("--nproc", "2", "--nnodes", "2", "--node-rank", "1", "--rendezvous", "127.0.0.1:4000") == 0
    started = calls[-1][1]
    assert (started["nproc"], started["nnodes"], started["node_rank"]) == (2, 2, 1)


def test_an_unknown_key_ends_before_anything_is_loaded(calls):
    assert train("plan.zerro=1") == 2
    assert calls == []


needs_torch = pytest.mark.skipif(installed("torch") is None, reason="training needs torch")


def test_a_folder_in_use_is_refused_before_any_rank_starts(calls, tmp_path, monkeypatch, capsys):
    hold = FileStore(tmp_path / "run").hold()
    monkeypatch.setattr(FileStore.hold, "__defaults__", (timedelta(0),))
    assert train("--nproc", "2") == 6
    assert f"{tmp_path / 'run'} is in use by process {os.getpid()} on" in capsys.readouterr().err
    assert [did for did, _ in calls] == ["check"]
    hold.close()
    assert train("--nproc", "2") == 0


@pytest.mark.cluster
@needs_torch
def test_two_processes_train_and_leave_a_run_folder(tmp_path):
    command = [sys.executable, "-m", "trainfleet.cli.main", "train", "recipes/tiny.yaml", "--nproc", "2"]
    done = subprocess.run([*command, "plan.zero=2"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "metrics.jsonl").exists()
    resolved = load_config(Recipe, file=tmp_path / "run" / "recipe.yaml", env={}).value
    assert resolved.plan.zero == 2 and resolved.train.steps == 3


@pytest.mark.cluster
@needs_torch
def test_a_rank_that_fails_is_named_and_its_code_is_the_commands():
    command = [sys.executable, "-m", "trainfleet.cli.main", "train", "recipes/tiny.yaml", "--nproc", "2"]
    bad = "train.observers=['tiny:Nobody']"
    done = subprocess.run([*command, bad], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("trainfleet: ") and "tiny has no 'Nobody'" in done.stderr.splitlines()[0]
    assert "Traceback" not in done.stderr
