"""The examples of launchers start and write what they say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytest.importorskip("torch", reason="the recipe is torch's")

EXAMPLES = Path(__file__).parents[2] / "examples"
BIN = Path(sys.executable).parent
SHORT = ["train.steps=2", "train.evaluate_every=null", "train.evaluate_batches=1", "train.finish=null"]


def run(folder: Path, *command: str) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", *command], cwd=folder, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.cluster
@pytest.mark.matrix
def test_two_processes_of_mpiexec_train(tmp_path: Path) -> None:
    if not (BIN / "mpiexec").exists():
        pytest.skip("there is no mpiexec beside this Python: pip install mpich")
    said = run(tmp_path, str(EXAMPLES / "mpiexec.sh"), *SHORT, f"folder={tmp_path / 'run'}")
    assert "processes 2" in said and said.count("finished") == 1


@pytest.mark.matrix
def test_the_files_for_clusters_are_written(tmp_path: Path) -> None:
    run(tmp_path, str(EXAMPLES / "launch_files.sh"), str(tmp_path / "files"), "train.steps=7")
    script = (tmp_path / "files" / "job.sh").read_text()
    assert "#SBATCH --gpus-per-node=2\n" in script and "train.steps=7" in script
    for kind, name in {"JobSet": "jobset", "PyTorchJob": "pytorchjob"}.items():
        made = list(yaml.safe_load_all((tmp_path / "files" / f"{name}.yaml").read_text()))
        assert [each["kind"] for each in made] == ["ConfigMap", "PersistentVolumeClaim", kind]
        assert yaml.safe_load(made[0]["data"]["recipe.yaml"])["train"]["steps"] == 7
