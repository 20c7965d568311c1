"""What is planted is found: the module, the samples, the rank; a clean step and an overflow of fp16 are left alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from proof.plants import PLANTS, Plant, hunt, hunt_numbered, trainer_of, wrong_in
from proof.rows import MARKED

from trainfleet.errors import TrainfleetError
from trainfleet.mesh import Mesh
from trainfleet.parallel import parallelize
from trainfleet.plan import Plan
from trainfleet.training.inspection.evidence import read_finding
from trainfleet.training.inspection.inspector import Inspector
from trainfleet.training.trainer import Trainer
from trainfleet.training.watchers.before import Before
from trainfleet.training.watchers.watcher import UnderWay, Watcher

ALONE = [plant for plant in PLANTS if plant.nproc == 1]
TWO_RANKS = [number for number, plant in enumerate(PLANTS) if plant.nproc == 2]


@pytest.mark.parametrize("plant", ALONE, ids=lambda plant: plant.name)
def test_what_is_planted_is_found(plant: Plant) -> None:
    assert wrong_in(plant, hunt(plant)) is None


@pytest.mark.cluster
def test_what_is_planted_on_two_ranks_is_found(ranks) -> None:
    for number in TWO_RANKS:
        found = ranks(2, hunt_numbered, number)
        assert wrong_in(PLANTS[number], found[0]) is None
        assert found[0].what == found[1].what and found[0].indices == found[1].indices


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_narrow_precisions_are_searched_alike(precision: str) -> None:
    assert wrong_in(ALONE[0], hunt(ALONE[0], precision=precision)) is None


def test_nothing_is_found_in_a_clean_run_and_an_overflow_of_fp16_is_not_asked_about() -> None:
    clean = Plant(name="clean", kind="", module=None)
    assert hunt(clean, steps=3) is None
    overflow = next(plant for plant in ALONE if plant.kind == "backward")
    assert hunt(overflow, steps=3, precision="fp16") is None


def test_the_step_is_afterwards_what_it_was_before_and_evidence_is_kept(tmp_path: Path) -> None:
    plant = ALONE[0]

    class Twice(Inspector):
        """Compares gradients and buffers around an explanation."""

        def explain(self, under_way):
            def state():
                model = under_way.engine.model
                held = [*(p.grad for p in model.parameters()), *model.buffers(), torch.get_rng_state()]
                return [each.clone() for each in held]

            before = state()
            found = super().explain(under_way)
            if found is not None:
                same = [torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, state(), strict=True)]
                self.same = all(same)
            return found

    with Mesh.from_env(Plan(), device="cpu") as mesh:
        _, trainer, hunter = trainer_of(plant, Plan(), mesh, tmp_path)
        inspector = hunter._inspector
        inspector.__class__ = Twice
        with pytest.raises(TrainfleetError, match=r"blocks\.2\.up was given what is finite"):
            trainer.fit(8)
    assert inspector.same  # type: ignore[attr-defined]
    finding = read_finding(tmp_path / "anomalies" / f"step_{trainer.step + 1:06d}")
    assert finding.indices == (MARKED,) and finding.path == hunter.finding.path and finding.seconds > 0
    assert json.loads((Path(finding.path) / "finding.json").read_text())["loss"] == "nan"
    assert (Path(finding.path) / "batch.safetensors").stat().st_size > 2 * 8 * 12 * 4


def test_hunts_are_few_and_not_two_in_a_row() -> None:
    plant = next(plant for plant in ALONE if plant.kind == "parameter")  # every step from the third on is not finite

    class Counting(Inspector):
        found = 0

        def explain(self, under_way):
            finding = super().explain(under_way)
            self.found += finding is not None

    with Mesh.from_env(Plan(), device="cpu") as mesh:
        _, trainer, hunter = trainer_of(plant, Plan(), mesh, None)
        hunter._inspector.__class__ = Counting
        trainer.fit(6)
    assert hunter._inspector.found == 1  # type: ignore[attr-defined]


def test_what_is_finite_the_second_time_is_said_to_be() -> None:
    calls = 0

    def once(output, batch):
        nonlocal calls
        calls += 1
        return output.sum() * (math.nan if calls == 3 else 1.0)

    finding = hunt(Plant(name="once", kind="not_again", module=None, loss=once))
    assert finding is not None and finding.kind == "not_again" and "a fault of the machine" in finding.what


class Spoiling(torch.nn.Module):
    """Gives NaN in its third call and in that call's repetition, above a BatchNorm that takes them in."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.norm(self.layer(x) * (math.nan if self.calls >= 3 else 1.0))


def test_statistics_that_the_step_itself_has_poisoned_are_not_taken_for_its_cause() -> None:
    found: list[Any] = []

    class Asking(Watcher):
        def judge(self, under_way: UnderWay) -> None:
            found.append(inspector.explain(under_way))

    with Mesh.from_env(Plan(), device="cpu") as mesh:
        model = parallelize(Spoiling(), mesh, Plan())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        batches = [torch.randn(4, 3) for _ in range(3)]
        inspector = Inspector(Before(model), batches, clip_norm=1.0)
        trainer = Trainer(
            model,
            optimizer,
            lambda out, _: out.sum(),
            batches,
            mesh=mesh,
            watchers=[inspector.before, inspector, Asking()],
        )
        trainer.fit(3)
    assert found[:2] == [None, None]
    assert (found[2].kind, found[2].phase) == ("code", "forward") and "layer" in found[2].what
