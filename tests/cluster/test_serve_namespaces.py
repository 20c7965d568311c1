"""Two network namespaces act as the CPU host and the GPU host: digits are trained, validated and predicted across."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from namespaces import Hosts, two_hosts

pytest.importorskip("torch", reason="a recipe trains with torch")
pytest.importorskip("sklearn", reason="the recipe trains on scikit-learn's digits")
pytest.importorskip("cryptography", reason="TLS off loopback needs the extra `net`")
pytest.importorskip("pyarrow", reason="predictions are written as Parquet")

pytestmark = [pytest.mark.cluster, pytest.mark.matrix]

CPU, GPU = 0, 1
RECIPES = Path(__file__).parents[2] / "recipes"
SHORT = ["train.steps=60", "train.evaluate_every=30", "checkpoint.every=30", "monitor.tensorboard=false"]
PROGRAM = [sys.executable, "-m", "trainfleet.cli.main"]


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with two_hosts() as made:
        made.limit("1gbit")
        yield made


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """The recipe, by itself and on both hosts: nothing but the network is between them."""
    for name in ("here", "cpu", "gpu"):
        (tmp_path / name).mkdir()
        for file in ("digits.yaml", "handwritten_digits.py"):
            shutil.copy(RECIPES / file, tmp_path / name)
    return {path.name: path for path in tmp_path.iterdir()}


def inside(folder: Path, *words: str) -> list[str]:
    return ["env", "-C", str(folder), "OMP_NUM_THREADS=1", *PROGRAM, *words]


def done(command: list[str]) -> str:
    finished = subprocess.run(command, capture_output=True, text=True, timeout=180, env=os.environ)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def on(hosts: Hosts, host: int, command: list[str]) -> str:
    return done(["ip", "netns", "exec", hosts.names[host], *command])


@contextmanager
def serving(hosts: Hosts, host: int, command: list[str]) -> Iterator[str]:
    """The token that it prints; it ends in order, by SIGTERM."""
    process = hosts.start(host, command)
    assert process.stdout is not None
    said = []
    try:
        for text in process.stdout:
            said.append(text)
            if "--feed" in text:
                break
        assert said and "--feed" in said[-1], "".join(said) + process.communicate()[1]
        reader = threading.Thread(target=process.stderr.read, daemon=True)  # type: ignore[union-attr]
        reader.start()
        yield said[-1].split("--feed", 1)[1].split()[0]
    finally:
        process.terminate()
        assert process.wait(30) == 0
        process.stdout.close()


def weights(folder: Path) -> str:
    """A digest of all bytes of the last checkpoint's model."""
    program = (
        "import sys; sys.path.insert(0, '.')\n"
        "from trainfleet.config import load_config\n"
        "from trainfleet.training.inference import predictor_of\n"
        "from trainfleet.training.recipe import Recipe\n"
        "print(predictor_of(load_config(Recipe, file='digits.yaml').value, device='cpu').digest)"
    )
    return done(["env", "-C", str(folder), sys.executable, "-c", program]).strip()


def rows(folder: Path) -> list[dict[str, object]]:
    import pyarrow.parquet as pq

    return [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_digits_are_trained_validated_and_predicted_across_as_they_are_here(hosts, folders):
    here, cpu, gpu = folders["here"], folders["cpu"], folders["gpu"]
    done(inside(here, "train", "digits.yaml", *SHORT))
    feed = inside(cpu, "feed", "digits.yaml", "--listen", "0.0.0.0:7700", "--address", Hosts.addresses[CPU])
    with serving(hosts, CPU, feed) as token:
        assert token.startswith("tf1_")
        on(hosts, GPU, inside(gpu, "train", "digits.yaml", "--feed", token, *SHORT))
    assert weights(gpu) == weights(here)

    validate, predict = ["validate", "digits.yaml", "--json", "found.json"], ["predict", "digits.yaml", "--to", "out"]
    predict += ["--top-k", "3", "--confidence", "0.5"]
    service = inside(gpu, "gpu-service", "digits.yaml", "--listen", "0.0.0.0:7800", "--address", Hosts.addresses[GPU])
    with serving(hosts, GPU, service) as token:
        assert token.startswith("tf1_")
        on(hosts, CPU, inside(cpu, *validate, "--feed", token))
        on(hosts, CPU, inside(cpu, *predict, "--feed", token))
        assert "Everything that was tried works." in on(hosts, CPU, inside(cpu, "doctor", token))
    done(inside(here, *validate))
    done(inside(here, *predict))
    found, expected = (json.loads((folder / "found.json").read_text()) for folder in (cpu, here))
    assert found == expected and found["accuracy"] > 0.8
    assert rows(cpu / "out") == rows(here / "out") and 100 < len(rows(cpu / "out")) < 360
    assert not (cpu / "runs").exists(), "the CPU host has no weights, and trains nothing"
