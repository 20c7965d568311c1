"""A job joins what a recipe names, goes on where it was, and leaves a finished run alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from rank_pool import RankPools  # noqa: E402
from torch import nn  # noqa: E402

from trainfleet.config import load_config  # noqa: E402
from trainfleet.errors import CheckpointError, ConfigError, DataError, PlanError, TrainfleetError  # noqa: E402
from trainfleet.training import job  # noqa: E402
from trainfleet.training.outcome import Outcome  # noqa: E402
from trainfleet.training.recipe import Recipe  # noqa: E402


class Net(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))

    def forward(self, x: Any) -> Any:
        return self.layers(x)


class Points(torch.utils.data.Dataset[Any]):
    def __init__(self, count: int = 64) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(count, 4, generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        return {"input": self.x[index], "target": self.x[index][:3].argmax()}


def finish(model: Any, mesh: Any, folder: Path) -> dict[str, Any]:
    return {"sample": "a text", "own figure": 1.5} if mesh.is_main else {}


QUIET = {"console": False, "tensorboard": False, "curve": False}


def recipe(folder: Path, **values: Any) -> Recipe:
    base: dict[str, Any] = {
        "model": {"name": f"{__name__}:Net"},
        "data": {
            "source": f"{__name__}:Points",
            "evaluation": {"source": f"{__name__}:Points", "args": {"count": 10}},
        },
        "batch": {"micro_batch": 4},
        "train": {"steps": 6, "evaluate_every": 3},
        "checkpoint": {"every": 2},
        "monitor": QUIET,
        "folder": str(folder),
    }
    for key, value in values.items():
        base[key] = {**base[key], **value} if isinstance(base.get(key), dict) else value
    return load_config(Recipe, values=base, env={}).value


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if kind in json.dumps(row)[:60]]


def test_a_run_leaves_a_folder_that_tells_all(tmp_path: Path) -> None:
    outcome = job.run(recipe(tmp_path / "run", train={"finish": f"{__name__}:finish"}))
    assert (outcome.step, outcome.reason) == (6, "finished")
    assert {"recipe.yaml", "environment.json", "metrics.jsonl", "checkpoints", "samples.txt"} <= {
        path.name for path in (tmp_path / "run").iterdir()
    }
    assert len(events(tmp_path / "run", "StepEnded")) == 6
    assert load_config(Recipe, file=tmp_path / "run" / "recipe.yaml", env={}).value.train.steps == 6


def test_a_stopped_run_goes_on_and_a_finished_one_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert job.run(recipe(folder, train={"steps": 4, "evaluate_every": None})).step == 4
    assert job.run(recipe(folder)).reason == "finished"
    assert [row["step"] for row in events(folder, "Restored")] == [4]
    assert job.run(recipe(folder)) == Outcome(step=6, reason="finished before", loss=None, evaluation=None)


def test_a_run_begun_anew_moves_the_earlier_one_aside(tmp_path: Path) -> None:
    job.run(recipe(tmp_path / "run"))
    assert job.run(recipe(tmp_path / "run", checkpoint={"resume": "never"})).reason == "finished"
    assert (tmp_path / "run.1" / "metrics.jsonl").exists()


def test_ranks_that_were_started_anew_go_on_even_in_a_run_begun_anew(tmp_path: Path) -> None:
    anew = recipe(tmp_path, checkpoint={"resume": "never"})
    assert job.as_restarted(anew, 0).checkpoint.resume == "never"
    assert job.as_restarted(anew, 1).checkpoint.resume == "auto"


def test_weights_alone_come_from_another_run(tmp_path: Path) -> None:
    job.run(recipe(tmp_path / "first"))
    from trainfleet.mesh import Mesh

    second = recipe(tmp_path / "second", model={"init_from": str(tmp_path / "first")}, train={"seed": 7})
    with Mesh.from_env() as mesh:
        with job.prepared(recipe(tmp_path / "first"), mesh, job.Given()) as first:
            expected = [p.detach().clone() for p in first.model.parameters()]
        with job.prepared(second, mesh, job.Given()) as trainer:
            assert trainer.step == 0
            assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), expected))


def on_ranks(folder: str, zero: int, deferred: bool) -> list[float]:
    job.run(recipe(Path(folder), plan={"zero": zero}, model={"deferred": deferred}, batch={"global_batch": 8}))
    return [row["loss"] for row in events(Path(folder), "StepEnded")]


@pytest.mark.parametrize(("zero", "deferred"), [(0, False), (3, True)])
def test_two_ranks_train_as_one_process_does(ranks: RankPools, tmp_path: Path, zero: int, deferred: bool) -> None:
    alone = ranks(1, on_ranks, str(tmp_path / "one"), 0, False)[0]
    for losses in ranks(2, on_ranks, str(tmp_path / "two"), zero, deferred):
        assert losses == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize(
    ("values", "error", "said"),
    [
        ({"model": {"name": f"{__name__}:Nett"}}, ConfigError, "Did you mean 'Net'"),
        ({"model": {"name": "no_such_module:Net"}}, ConfigError, "no module 'no_such_module'"),
        ({"model": {"args": {"depth": 3}}}, ConfigError, "does not take model.args"),
        ({"model": {"name": f"{__name__}:finish"}}, ConfigError, "does not take model.args"),
        ({"model": {"name": None}}, ConfigError, "model.name is not set"),
        ({"loss": "msee"}, ConfigError, "loss is 'msee'"),
        ({"checkpoint": {"resume": "must"}}, CheckpointError, "no checkpoint in"),
        ({"model": {"init_from": "nowhere"}}, CheckpointError, "nowhere"),
        ({"batch": {"micro_batch": 65}}, DataError, "64"),
        ({"plan": {"zero": 1, "dp_shard": 4}}, PlanError, "4"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    tmp_path: Path, values: dict[str, Any], error: type[TrainfleetError], said: str
) -> None:
    with pytest.raises(error, match=said):
        job.run(recipe(tmp_path / "run", **values))


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainfleetError, match="file"):
        job.run(recipe(tmp_path / "file" / "run"))


def test_check_says_what_would_be_trained_and_writes_nothing(tmp_path: Path) -> None:
    lines = "\n".join(job.check(recipe(tmp_path / "run", plan={"zero": 2}), 4))
    assert "zero=2 dp_replicate=1 dp_shard=4" in lines
    assert "67 parameters" in lines
    assert "64 samples" in lines
    assert not (tmp_path / "run").exists()
