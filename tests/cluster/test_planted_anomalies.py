"""Anomalies planted in real runs are each told under the right name and policy.

`make test` plants a choice; `make matrix` all of them. Runs without any: test_clean_runs.py.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="a run needs torch")

from rank_pool import RankPools  # noqa: E402
from small_job import STEPS, write_job  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from trainfleet.config import load_config  # noqa: E402
from trainfleet.errors import AnomalyStopped  # noqa: E402
from trainfleet.events import ANOMALIES, AnomalySeen, Event, StepEnded  # noqa: E402
from trainfleet.training.job import Given, run  # noqa: E402
from trainfleet.training.recipe import Recipe  # noqa: E402

AT = 70
"""The step at which most of them are planted: what is usual is known then."""
LONG = 24 << 17
"""Numbers of a leak's step: 24 MiB."""


def rank_and_size() -> tuple[int, int]:
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


class Trouble:
    """What goes wrong in this process, and when. Model and source ask it."""

    def __init__(self, plant: str, at: int, rank: int) -> None:
        self.plant, self.at, self.rank = plant, at, rank
        self.step = 1
        self.held: list[Tensor] = []

    def is_here(self, plant: str, rank: int, *, lasting: bool = False) -> bool:
        """Whether this is the time and the place."""
        due = self.step >= self.at if lasting else self.step == self.at
        return self.plant == plant and self.rank == rank and due


class Learner(nn.Module):
    """Learns to add four numbers; in its forward something may go wrong."""

    def __init__(self, trouble: Trouble) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        self.head = nn.Linear(32, 1)
        self.trouble = trouble

    def forward(self, x: Tensor) -> Tensor:
        trouble, last = self.trouble, rank_and_size()[1] - 1
        if not self.training:
            return self.head(self.layers(x))
        if trouble.is_here("loss", last):
            x = x * math.nan
        if trouble.is_here("slow", last, lasting=True):
            time.sleep(0.05)
        if trouble.is_here("leak", last, lasting=True):
            trouble.held.append(torch.ones(LONG))
        is_dead = trouble.plant == "dead" and trouble.step >= trouble.at
        y = self.head(self.layers[4](self.layers[:4](x) - 1e3 * is_dead))
        if trouble.is_here("gradient", last):
            y.register_hook(lambda gradient: gradient * math.inf)
        if trouble.is_here("explosion", last):
            y.register_hook(lambda gradient: gradient * 1e5)
        if trouble.is_here("spike", last):
            y.register_hook(lambda gradient: gradient / 100)
            y = y + 100
        return y


class Numbers:
    """Samples, each a little noisy; getting them may take long."""

    def __init__(self, trouble: Trouble) -> None:
        self.trouble = trouble

    def __len__(self) -> int:
        return 640

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if self.trouble.is_here("hang", 1):
            time.sleep(0.8)
            self.trouble.plant = ""
        if self.trouble.is_here("starve", 0, lasting=True):
            time.sleep(0.002)
        draw = torch.Generator().manual_seed(index)
        x = torch.randn(4, generator=draw)
        return {"input": x, "label": x.sum(0, keepdim=True) + 0.5 * torch.randn(1, generator=draw)}


class Heard:
    """What the run tells; it counts the steps for those that make the trouble, also those taken again."""

    in_loop = True

    def __init__(self, trouble: Trouble) -> None:
        self.trouble = trouble
        self.events: list[Event] = []

    def on_event(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, StepEnded):
            self.trouble.step = event.step + 1
        if isinstance(event, AnomalySeen) and event.policy == "rollback":
            self.trouble.plant = ""  # the batch after it is another one


@dataclass(frozen=True, kw_only=True)
class Planted:
    """An anomaly, and how it is to be told."""

    kind: str
    policy: str = "warn"
    plant: str
    ranks: int = 1
    at: int = AT
    steps: int = AT + 15
    config: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    log_interval: int = 5
    rank: int | None = None
    """That it names; None: none, or one that tells where a NaN came from."""
    says: str = ""

    def __str__(self) -> str:
        return f"{self.kind}-{self.policy}-{self.ranks}"


STARVES = {"lasting_seconds": 0.3}
SOON: dict[str, Any] = {**STARVES, "data_starvation": None}  # getting these samples does take long
GROWS = {"growth_share": 0.2}
DEAD = {"dead_every": 1}
LEAK = {"plant": "leak", "at": 10, "steps": 75, "log_interval": 1, "config": GROWS}
ALL = [
    Planted(kind="loss_not_finite", plant="loss", says="The loss is nan"),
    Planted(kind="loss_not_finite", policy="skip", plant="loss", at=6, steps=10),
    Planted(kind="loss_not_finite", policy="skip", plant="loss", ranks=2, at=6, steps=10),
    Planted(kind="loss_not_finite", policy="rollback", plant="loss", at=6, steps=10, train={"rollback_every": 2}),
    Planted(kind="loss_not_finite", policy="stop", plant="loss", ranks=2, at=6, steps=10),
    Planted(kind="gradient_not_finite", plant="gradient", at=6, steps=6, says="norm of the gradient is"),
    Planted(kind="gradient_not_finite", policy="skip", plant="gradient", ranks=2, at=6, steps=10),
    Planted(kind="gradient_not_finite", policy="stop", plant="gradient", at=6, steps=10),
    Planted(kind="loss_spike", plant="spike", says="robust standard deviations above"),
    Planted(kind="loss_spike", policy="skip", plant="spike", ranks=2),
    Planted(kind="loss_spike", policy="rollback", plant="spike", train={"rollback_every": 10}),
    Planted(kind="loss_spike", policy="stop", plant="spike"),
    Planted(kind="gradient_explosion", plant="explosion", ranks=2, says="times the usual"),
    Planted(kind="gradient_explosion", policy="skip", plant="explosion"),
    Planted(kind="dead_units", plant="dead", at=3, steps=85, config=DEAD, says="100% of layers.4"),
    Planted(kind="dead_units", policy="stop", plant="dead", ranks=2, at=3, steps=85, config=DEAD),
    Planted(kind="throughput_drop", plant="slow", steps=AT + 60, config=SOON, says="of the usual"),
    Planted(kind="stalled_step", plant="hang", ranks=2, at=20, steps=30, config={"stall_floor_seconds": 0.3}, rank=1),
    Planted(kind="slow_rank", plant="slow", ranks=2, at=5, steps=40, config=SOON, rank=1, says="it is slow in forward"),
    Planted(kind="slow_rank", policy="stop", plant="slow", ranks=2, at=5, steps=60, config=SOON, rank=1),
    Planted(kind="data_starvation", plant="starve", at=10, steps=90, config=STARVES, says="mostly for source"),
    Planted(
        kind="disk_filling", plant="disk", at=1, steps=300, config={"disk_minutes": 0.02}, says="it is full in 0:0"
    ),
    Planted(kind="memory_growth", **LEAK, rank=0, says="a step"),
    Planted(kind="memory_growth", policy="stop", **LEAK, ranks=2, rank=1),
]
CHOSEN = {
    "loss_not_finite-skip-2",
    "loss_not_finite-stop-2",
    "gradient_not_finite-warn-1",
    "loss_spike-rollback-1",
    "gradient_explosion-warn-2",
    "dead_units-warn-1",
    "throughput_drop-warn-1",
    "stalled_step-warn-2",
    "slow_rank-warn-2",
    "data_starvation-warn-1",
    "disk_filling-warn-1",
    "memory_growth-warn-1",
}
PARAMETERS = [pytest.param(each, id=str(each), marks=() if str(each) in CHOSEN else pytest.mark.matrix) for each in ALL]


def test_twenty_and_more_of_all_kinds_are_planted() -> None:
    assert len(ALL) >= 20 and {each.kind for each in ALL} == set(ANOMALIES)
    assert {str(each) for each in ALL} > CHOSEN and len({str(each) for each in ALL}) == len(ALL)
    assert {each.kind for each in ALL if str(each) in CHOSEN} == set(ANOMALIES)


def planted_run(folder: str, planted: Planted, only_steps: int | None = None) -> tuple[list[Event], Any, str]:
    """What this rank heard, the model afterwards, and what the run ended with."""
    trouble = Trouble(planted.plant, planted.at, rank_and_size()[0])
    heard, torch_model = Heard(trouble), Learner(trouble)
    values = {
        "folder": folder,
        "batch": {"micro_batch": 8},
        "plan": {"zero": 2 if planted.ranks > 1 else 0},
        "loss": "mse",
        "optimizer": {"lr": 0.01},
        "schedule": {"name": "constant"},
        "train": {"steps": only_steps or planted.steps, **planted.train},
        "checkpoint": {"every": 1000},
        "monitor": {
            "console": False,
            "tensorboard": False,
            "curve": False,
            "log_interval": planted.log_interval,
            "anomalies": {planted.kind: planted.policy, **planted.config},
        },
    }
    torch.manual_seed(0)
    reason = "finished"
    given = Given(model=torch_model, source=Numbers(trouble), observers=[heard])
    with filling_disk() if planted.plant == "disk" else contextlib.nullcontext():
        try:
            run(load_config(Recipe, values=values, env={}).value, given)
        except AnomalyStopped as error:
            reason = str(error)
    trouble.held.clear()
    state = {name: _whole(tensor) for name, tensor in torch_model.state_dict().items()}
    return heard.events, state, reason


def _whole(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


@contextlib.contextmanager
def filling_disk() -> Iterator[None]:
    """A disk that is full a second after the first look."""
    usage, looks = shutil.disk_usage, []

    def filling(path: Any) -> Any:
        looks.append(time.monotonic())
        return SimpleNamespace(free=int(1e11 * max(0.01, 1 - (looks[-1] - looks[0]))))

    shutil.disk_usage = filling  # type: ignore[assignment]
    try:
        yield
    finally:
        shutil.disk_usage = usage


def runs_of(ranks: RankPools, folder: Path, planted: Planted, only_steps: int | None = None) -> list[Any]:
    return ranks(planted.ranks, planted_run, str(folder), planted, only_steps)


@pytest.mark.parametrize("planted", PARAMETERS)
def test_a_planted_anomaly_is_told_by_name_and_policy(ranks: RankPools, planted: Planted, tmp_path: Path) -> None:
    results = runs_of(ranks, tmp_path / "run", planted)
    for events, _, _ in results:
        seen = [event for event in events if isinstance(event, AnomalySeen)]
        assert [(each.kind, each.policy) for each in seen] == [(planted.kind, planted.policy)]
        (found,) = seen
        assert planted.rank in (None, found.rank) and planted.says in found.what and not found.what.endswith(".")
        assert found.step >= planted.at
        if planted.plant in ("loss", "gradient", "spike", "explosion"):
            assert found.step == planted.at
    _, state, reason = results[0]
    assert ("says what to do: stop" in reason) == (planted.policy == "stop")
    if planted.policy != "warn":
        assert all(bool(tensor.isfinite().all()) for tensor in state.values()), "buffers too"
    if planted.policy == "stop":
        assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if "step" in path.name]
    if planted.policy == "skip":
        _, before, _ = runs_of(ranks, tmp_path / "before", planted, planted.at - 1)[0]
        _, after, _ = runs_of(ranks, tmp_path / "after", planted, planted.at)[0]
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before), "as if the batch had not been"


# from the command line

HANGS = """
class Hangs(Numbers):
    def __getitem__(self, index):
        import os, time
        if index == 60 and not pathlib.Path("hung").exists():
            pathlib.Path("hung").write_text("")
            time.sleep(60)
        return super().__getitem__(index)

class Bad(Numbers):
    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return {**sample, "input": sample["input"] * float("nan" if index == 60 else 1)}
"""


def command(folder: Path, source: str, anomalies: str, *options: str) -> tuple[int, str, Any]:
    """Exit code, what was said, and the job, of `trainfleet train` on two ranks."""
    changes = {"learner:Numbers": f"learner:{source}", "console: false": f"console: false, anomalies: {{{anomalies}}}"}
    job = write_job(folder, **{**changes, f"steps: {STEPS}": "steps: 25"})
    with (job.folder / "learner.py").open("a") as module:
        module.write(HANGS)
    started = job.start(["trainfleet", "train", "recipe.yaml", "--nproc", "2", *options])
    try:
        said, _ = started.communicate(timeout=90)
    finally:
        started.kill()
    return started.returncode, said, job


@pytest.mark.matrix
def test_a_run_that_stops_for_an_anomaly_ends_with_its_code_and_is_not_started_anew(tmp_path: Path) -> None:
    code, said, job = command(tmp_path / "job", "Bad", "loss_not_finite: stop", "--max-restarts", "3")
    assert code == 17 and "The loss is nan" in said and "says what to do: stop" in said
    assert "start anew" not in said and len([*(job.folder / "run" / "checkpoints").glob("*step*")]) >= 1


@pytest.mark.matrix
def test_a_rank_that_hangs_ends_itself_and_the_ranks_start_anew(tmp_path: Path) -> None:
    stall = "stalled_step: stop, stall_floor_seconds: 1.0, stall_stop_seconds: 2.0"
    code, said, _ = command(tmp_path / "once", "Hangs", stall)
    assert code == 18 and "hung in data, at" in said and "in __getitem__" in said
    code, said, job = command(tmp_path / "again", "Hangs", stall, "--max-restarts", "1")
    assert code == 0, said
    assert "did not end step" in said and list(job.losses()) == list(range(1, 26))
