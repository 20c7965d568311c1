"""`trainfleet launch` checks the recipe first, then writes or starts what the flags say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from trainfleet.cli.main import main

RECIPE = """
folder: run
model: {name: 'tiny_launched:Tiny'}
data: {source: 'tiny_launched:Numbers'}
batch: {global_batch: 8}
loss: mse
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
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    (tmp_path / "tiny_launched.py").write_text(TINY)


def launch(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["launch", *arguments])
    return int(ended.value.code or 0)


def test_slurm_writes_to_the_terminal_and_remarks_go_beside(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch("slurm", "tiny.yaml", "--time", "60", "--nodes", "2", "--no-check", "checkpoint.every=null") == 0
    out, err = capsys.readouterr()
    assert out.startswith("#!/usr/bin/env bash\n") and f"cd {Path.cwd()} || exit 1" in out
    assert "train tiny.yaml checkpoint.every=null --nproc 1 --nnodes 2" in out
    assert "note: checkpoint.every is null" in err and "all 2 hosts must see" in err


def test_slurm_writes_a_file_that_can_be_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch("slurm", "tiny.yaml", "--time", "60", "--output", "job.sh", "--no-check") == 0
    assert subprocess.run(["bash", "-n", "job.sh"]).returncode == 0
    assert Path("job.sh").stat().st_mode & 0o111
    assert capsys.readouterr().out == ""
    assert launch("slurm", "tiny.yaml", "--time", "60", "--output", "no/such/folder.sh", "--no-check") == 8
    assert "no/such/folder.sh cannot be written: No such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words", "code"),
    [
        (["plan.dp_shard=2", "plan.zero=2", "plan.dp_replicate=1"], "The plan needs dp_replicate x dp_shard", 3),
        (["batch.global_batch=3"], "fewer samples than the 4 data ranks", 2),
        (["batch.globl_batch=3"], "globl_batch", 2),
    ],
)
def test_a_plan_that_does_not_fit_so_many_hosts_is_refused(
    flags: list[str], words: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--nodes", "2", "--nproc-per-node", "2", "--time", "60", "--no-check"]
    assert launch("slurm", "tiny.yaml", *where, *flags) == code
    assert words in capsys.readouterr().err


def test_what_the_recipe_names_is_looked_for_here_unless_it_is_only_there(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch", reason="the model is built")
    assert launch("slurm", "tiny.yaml", "--time", "60") == 0
    capsys.readouterr()
    flags = ["model.name=only_in_the_image:Model", "--time", "60"]
    assert launch("slurm", "tiny.yaml", *flags) == 2
    assert "only_in_the_image" in capsys.readouterr().err
    assert launch("slurm", "tiny.yaml", *flags, "--no-check") == 0


def test_kubernetes_writes_a_recipe_that_pods_can_load(capsys: pytest.CaptureFixture[str]) -> None:
    import yaml

    flags = ["--image", "registry/train:1", "--claim", "runs", "--nodes", "2", "--no-check"]
    assert launch("kubernetes", "tiny.yaml", *flags, "train.steps=7") == 0
    config_map, job_set = yaml.safe_load_all(capsys.readouterr().out)
    Path("in_pod.yaml").write_text(config_map["data"]["recipe.yaml"])
    assert "folder: /mnt/runs/run\n" in config_map["data"]["recipe.yaml"]
    with pytest.raises(SystemExit) as ended:
        main(["config", "show", "in_pod.yaml", "--yaml"])
    assert not ended.value.code and "steps: 7" in capsys.readouterr().out
    assert job_set["kind"] == "JobSet"
    assert launch("kubernetes", "tiny.yaml", *flags, "--kind", "deployment") == 8
    assert "The kind is 'deployment'; allowed: jobset, pytorchjob." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "Name the hosts by --hosts A,B or by --hosts-file FILE"),
        (["--hosts", "a", "--hosts-file", "b"], "one of the two"),
        (["--hosts", "a,a"], "The host a is listed 2 times"),
        (["--hosts", "a,b", "--rendezvous", "a"], "The rendezvous is 'a'; write host:port"),
        (["--hosts-file", "none"], "The list of hosts none cannot be read"),
    ],
)
def test_ssh_refuses_what_it_cannot_reach_before_it_connects(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch("ssh", "tiny.yaml", "--no-check", *flags) == 8
    assert words in capsys.readouterr().err
