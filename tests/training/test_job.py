"""A job joins what a recipe names, goes on where it was, and leaves a finished run alone."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import pytest

torch = pytest.importorskip("torch")

from rank_pool import RankPools  # noqa: E402
from torch import nn  # noqa: E402

from trainfleet.checkpoint import Checkpointer  # noqa: E402
from trainfleet.config import load_config  # noqa: E402
from trainfleet.errors import (  # noqa: E402
    CheckpointError,
    ConfigError,
    DataError,
    FailedTwice,
    PlanError,
    StoreError,
    TrainfleetError,
)
from trainfleet.events import CheckpointFailed, CheckpointSaved, StepEnded  # noqa: E402
from trainfleet.monitor import read_metrics  # noqa: E402
from trainfleet.store import FileStore  # noqa: E402
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


class Bytes(Points):
    """The points as uint8, which `unbyted` reads."""

    def __getitem__(self, index: int) -> Any:
        sample = super().__getitem__(index)
        return {**sample, "input": (sample["input"] * 40 + 128).clamp(0, 255).to(torch.uint8)}


def unbyted(batch: Any) -> Any:
    return {**batch, "input": (batch["input"].float() - 128) / 40}


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

    with Mesh.from_env() as mesh:
        with job.prepared(recipe(tmp_path / "first"), mesh, job.Given()) as first:
            expected = [p.detach().clone() for p in first.model.parameters()]
            torch.save({"model": first.model.state_dict()}, tmp_path / "first.pt")
        for place in ("first", "first.pt"):
            second = recipe(tmp_path / f"from_{place}", model={"init_from": str(tmp_path / place)}, train={"seed": 7})
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


class Flaky:
    """A step function that fails where it is told to, and remembers nothing of it."""

    failures: ClassVar[list[tuple[int, str]]] = []

    def __call__(self, engine: Any, micro_batches: Any) -> Any:
        if self.failures and engine.steps == self.failures[0][0]:
            raise ValueError(self.failures.pop(0)[1])
        return engine.forward_backward(micro_batches)


flaky = Flaky()


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl")]


def test_a_run_of_one_process_goes_on_after_errors_that_do_not_repeat(tmp_path: Path) -> None:
    job.run(recipe(tmp_path / "plain"))
    Flaky.failures = [(3, "one"), (5, "two"), (5, "three")]
    trying = {"max_retries": 3, "step_fn": f"{__name__}:flaky"}
    assert job.run(recipe(tmp_path / "run", train=trying)).reason == "finished"
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")


@pytest.mark.parametrize(
    ("failures", "retries", "error", "left"),
    [
        ([(3, "one"), (3, "one"), (3, "x")], 9, FailedTwice, 1),
        ([(3, "a"), (3, "b"), (3, "c")], 2, ValueError, 0),
    ],
)
def test_the_same_error_at_the_same_step_is_not_tried_a_third_time(
    tmp_path: Path, failures: list[tuple[int, str]], retries: int, error: type[Exception], left: int
) -> None:
    Flaky.failures = failures
    with pytest.raises(error, match=r"(after step 3: one|^c)$") as caught:
        job.run(recipe(tmp_path, train={"max_retries": retries, "step_fn": f"{__name__}:flaky"}))
    assert len(Flaky.failures) == left
    report = tmp_path / "failure.txt"
    assert report.exists() == (error is FailedTwice)
    if isinstance(caught.value, FailedTwice):
        assert str(report) in (caught.value.hint or "") and "raise ValueError" in report.read_text()


def test_retries_without_checkpoints_change_nothing(tmp_path: Path) -> None:
    Flaky.failures = [(3, "one"), (3, "two")]
    trying = {"max_retries": 3, "step_fn": f"{__name__}:flaky"}
    with pytest.raises(ValueError, match="one"):
        job.run(recipe(tmp_path, train=trying, checkpoint={"every": None}))


def test_a_second_run_in_one_folder_is_told_whose_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job.run(recipe(tmp_path / "run"))
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    hold = FileStore(tmp_path / "run").hold()
    monkeypatch.setattr(FileStore.hold, "__defaults__", (timedelta(0),))
    for choice in ("auto", "never"):
        with pytest.raises(StoreError, match=rf"{tmp_path / 'run'} is in use by process \d+ on"):
            job.run(recipe(tmp_path / "run", checkpoint={"resume": choice}))
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before and not (tmp_path / "run.1").exists()
    hold.close()
    assert job.run(recipe(tmp_path / "run", checkpoint={"resume": "never"})).reason == "finished"


def test_the_best_is_kept_by_the_loss_of_its_evaluation(tmp_path: Path) -> None:
    saving = {"every": 1, "keep_last": 1, "keep_best": 1}
    job.run(recipe(tmp_path, train={"evaluate_every": 1, "steps": 6}, checkpoint=saving, optimizer={"lr": 3.0}))
    evaluations = {row["step"]: row["loss"] for row in events(tmp_path, "Evaluated")}
    best = min(evaluations, key=lambda step: (evaluations[step], -step))
    assert {int(path.name[5:]) for path in (tmp_path / "checkpoints").glob("step-*")} == {best, 6}


def test_a_small_disk_that_fills_up_costs_saves_and_no_step(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.call(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]):
        pytest.skip("A small file system could not be mounted: that needs root and the right to mount.")
    try:
        Disk.filler, Disk.failed = disk / "filler", 0
        wide = {"model": {"name": f"{__name__}:Net", "args": {"width": 900}}}  # 90 kB a checkpoint
        saving = {"folder": str(disk / "checkpoints"), "every": 2, "keep_last": 2}
        slow = {"steps": 10, "evaluate_every": None, "observers": [f"{__name__}:Disk"]}
        assert job.run(recipe(tmp_path / "run", **wide, checkpoint=saving, train=slow)).reason == "finished"
        assert [row["step"] for row in events(tmp_path / "run", "CheckpointSaved")] == [2, 8, 10]
        failed = events(tmp_path / "run", "CheckpointFailed")
        assert [row["step"] for row in failed] == [4, 6] and all("the disk is full" in row["reason"] for row in failed)
        assert len(losses(tmp_path / "run")) == 10
        checkpointer = Checkpointer(FileStore(disk / "checkpoints"))
        assert [checkpointer.verify(step) for step in checkpointer.steps()] == [[], []]
    finally:
        subprocess.check_call(["umount", str(disk)])


class Disk:
    """Fills the disk after the first save, and makes room after two that failed."""

    filler: ClassVar[Path]
    failed: ClassVar[int]

    def on_event(self, event: Any) -> None:
        if isinstance(event, CheckpointSaved) and event.step == 2:
            self.filler.write_bytes(bytes(300_000))
        if isinstance(event, CheckpointFailed):
            Disk.failed += 1
            if self.failed == 2:
                self.filler.unlink()


def test_what_is_done_on_the_device_is_what_a_transform_does_before(tmp_path: Path) -> None:
    """In training and in evaluation, to the bit: only what travels differs."""
    args: dict[str, Any] = {"source": f"{__name__}:Bytes", "evaluation": {"source": f"{__name__}:Bytes"}}
    before = job.run(recipe(tmp_path / "before", data={**args, "transform": f"{__name__}:unbyted"}))
    on_device = job.run(recipe(tmp_path / "device", data={**args, "on_device": f"{__name__}:unbyted"}))
    assert before.loss is not None and before == on_device


class Blocks:
    """An observer that never returns from the first step."""

    def on_event(self, event: Any) -> None:
        if isinstance(event, StepEnded):
            threading.Event().wait(60)


def test_a_run_tells_of_its_machine_fires_its_alerts_and_leaves_out_who_blocks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told = tmp_path / "told"
    alert = {"when": "loss > 0", "command": f"sh -c 'echo $ALERT_STEP > {told}'", "webhook": "http://127.0.0.1:9/hush"}
    monitor = {
        **QUIET,
        "log_interval": 2,
        "observer_deadline_seconds": 0.2,
        "alerts": [{**alert, "timeout_seconds": 1}, "system.memory_total_bytes > 1"],
    }
    folder = tmp_path / "run"
    outcome = job.run(recipe(folder, monitor=monitor, train={"observers": [f"{__name__}:Blocks"]}))
    assert outcome.reason == "finished" and told.read_text() == "1\n"
    assert [(row["step"], row["alert"]) for row in events(folder, "AlertFired")] == [
        (1, "loss > 0"),
        (2, "system.memory_total_bytes > 1"),
    ]
    reports = events(folder, "RanksReported")
    assert [row["step"] for row in reports] == [2, 4, 6]
    assert all({"memory_available_bytes", "disk_free_bytes"} <= set(row["ranks"][0]["system"]) for row in reports)
    assert "Observer Blocks has not returned from StepEnded in 0.2 s" in caplog.text
    written = [path for path in folder.rglob("*") if path.is_file() and b"hush" in path.read_bytes()]
    assert written == [], "a webhook's path often is its password"
