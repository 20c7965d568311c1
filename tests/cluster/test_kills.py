"""A run that is killed at any moment ends as the run that was never killed: losses and parameters, to the bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="a run needs torch")

from killed_run import RECIPE, STEPS, await_step, losses, ranks_of, same, states_at, write_job

from trainfleet.checkpoint import Checkpointer
from trainfleet.store import FileStore

pytestmark = pytest.mark.cluster

COMMAND = [sys.executable, "-m", "trainfleet.cli.main", "train", "recipe.yaml", "--nproc", "2"]
PLACES = (
    "mid-step",
    "staging",
    "writing shards",
    "before the commit",
    "at the rename",
    "after the commit",
    "pruning",
    "restoring",
)
ON_RANK_0 = ("before the commit", "after the commit", "pruning")  # only it does these


def kills_of(seed: int, count: int) -> list[dict[str, Any]]:
    """Every place in turn; calls, ranks and victims by chance."""
    chance = random.Random(seed)
    order = [PLACES[i % len(PLACES)] for i in range(count)]
    chance.shuffle(order)
    found = []
    for place in order:
        victims = ["rank", "ranks", "all", "job"]
        if place == "writing shards":
            victims.append("writer")
        kill = {"place": place, "rank": 0 if place in ON_RANK_0 else chance.randrange(2)}
        # A start begins at the newest checkpoint, of which there is none before the first save.
        most = {"mid-step": 9, "staging": 30, "writing shards": 30, "at the rename": 9, "restoring": 1}.get(place, 3)
        found.append({**kill, "call": chance.randint(1, most), "victims": chance.choice(victims)})
    return found


def train(folder: Path, kills: list[dict[str, Any]], recipe: str = RECIPE) -> int:
    """Start the same command until it ends well; how often it had to be started."""
    write_job(folder, recipe)
    (folder / "kills.json").write_text(json.dumps(kills))
    environment = {
        **{name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")},
        "PYTHONPATH": str(Path(__file__).parent / "killing"),
        "KILLS": str(folder / "kills.json"),
        "OMP_NUM_THREADS": "1",
    }
    command = [*COMMAND, "--max-restarts", str(len(kills))]
    for start in range(1, len(kills) + 2):
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
        if done.returncode == 0:
            return start
        assert done.returncode == -signal.SIGKILL, done.stdout[-2000:] + done.stderr[-4000:]
    raise AssertionError("the run did not come to its end")


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run without kills, all of its checkpoints kept."""
    folder = tmp_path_factory.mktemp("reference") / "job"
    assert train(folder, [], RECIPE.replace("keep_last: 2", "keep_last: 1000")) == 1
    return folder


def hold_against(never_killed: Path, folder: Path, kills: list[dict[str, Any]]) -> None:
    train(folder, kills)
    undone = [kill for i, kill in enumerate(kills) if not (folder / f"kills.{i}.done").exists()]
    assert not undone, "the run ended before these"
    assert [step for step, _ in losses(folder)] == list(range(1, STEPS + 1))
    assert losses(folder) == losses(never_killed)
    standing = Checkpointer(FileStore(folder / "run" / "checkpoints")).steps()
    assert standing[-1] == STEPS
    for step in standing:
        found, expected = states_at(folder, step), states_at(never_killed, step)
        assert [name for name in expected if not same(found.get(name), expected[name])] == [], step
    left = [path.name for path in (folder / "run" / "checkpoints").rglob("*") if path.name.startswith(".unfinished")]
    assert left == [], "a later save clears what killed ones left"


def test_eight_kills_leave_the_run_that_was_never_killed(never_killed: Path, tmp_path: Path) -> None:
    hold_against(never_killed, tmp_path / "job", kills_of(seed=1, count=8))


@pytest.mark.matrix
@pytest.mark.parametrize("seed", range(2, 9))
def test_fifty_six_kills_leave_the_run_that_was_never_killed(never_killed: Path, tmp_path: Path, seed: int) -> None:
    hold_against(never_killed, tmp_path / "job", kills_of(seed=seed, count=8))


@pytest.mark.matrix
def test_a_rank_that_hangs_is_given_up_by_the_others_and_the_run_goes_on(never_killed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "job"
    write_job(folder)
    launcher = subprocess.Popen([*COMMAND, "--max-restarts", "1", "train.timeout_seconds=2"], cwd=folder)
    try:
        await_step(folder, 10)
        (rank,) = ranks_of(launcher.pid)[1:]
        begun = time.monotonic()
        rank.suspend()
        while rank.is_running():
            assert time.monotonic() < begun + 60, "the stopped rank is still there"
            time.sleep(0.05)
        assert launcher.wait(120) == 0
    finally:
        launcher.kill()
    assert losses(folder) == losses(never_killed)
    assert same(states_at(folder, STEPS), states_at(never_killed, STEPS))
