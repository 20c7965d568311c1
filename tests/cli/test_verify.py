from __future__ import annotations

import json
import sys

import pytest

from trainfleet.cli.main import main
from trainfleet.plan import Plan
from trainfleet.training.proof import verify_recipe as proof
from trainfleet.training.proof.verdict import Difference, Verdict
from trainfleet.training.recipe import Recipe

FINE = Difference(tensor="step 1, loss", deviation=1e-7, tolerance=2e-5)
WRONG = Difference(tensor="step 1, gradient of w", deviation=0.5, tolerance=2e-5)
MISSING = Difference(tensor="step 1, gradient of b", deviation=float("inf"), tolerance=2e-5)


@pytest.fixture
def verify(tmp_path, monkeypatch, capsys):
    """Runs the verb with a given verdict; what it was asked, its code and what it said."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "x.yaml").write_text("model: {name: 'a:B'}\ndata: {source: csv}\nbatch: {micro_batch: 2}\n")

    def run(verdict: Verdict, *arguments: str):
        asked: list[tuple[Plan, int, int, int]] = []

        def verify_recipe(recipe: Recipe, nproc: int, *, steps: int) -> Verdict:
            asked.append((recipe.plan, recipe.train.seed, nproc, steps))
            return verdict

        monkeypatch.setattr(proof, "verify_recipe", verify_recipe)
        with pytest.raises(SystemExit) as ended:
            main(["verify", "x.yaml", *arguments])
        return asked, ended.value.code, capsys.readouterr().out

    return run


def test_a_plan_that_holds_ends_with_0(verify):
    verdict = Verdict(compared=9, first=None, largest=FINE, remarks=("Dropout is off.",))
    asked, code, said = verify(verdict, "plan.zero=2", "train.seed=5")
    assert asked == [(Plan(zero=2), 5, 2, 3)]
    assert code == 0 and "zero=2 dp_replicate=1 dp_shard=2 fp32 on 2 processes, 3 steps" in said
    assert "note: Dropout is off." in said and "9 tensors agree" in said


def test_a_plan_that_does_not_hold_names_the_first_tensor_and_ends_with_1(verify):
    verdict = Verdict(compared=9, first=WRONG, largest=MISSING)
    asked, code, said = verify(verdict, "--nproc", "4", "--steps", "1")
    assert asked[0][1:] == (0, 4, 1)
    assert code == 1 and "First to differ: step 1, gradient of w" in said


def test_programs_get_json_without_infinity(verify):
    _, code, said = verify(Verdict(compared=9, first=WRONG, largest=MISSING), "--json")
    content = json.loads(said, parse_constant=lambda name: pytest.fail(name))
    assert code == 1 and content["holds"] is False
    assert content["first"]["tensor"] == "step 1, gradient of w" and content["largest"]["deviation"] is None


def test_an_impossible_plan_is_refused_before_anything_runs(verify):
    asked, code, _ = verify(
        Verdict(compared=0, first=None, largest=FINE), "plan.zero=3", "plan.dp_shard=4", "--nproc", "2"
    )
    assert code == 3 and asked == []


def test_a_plan_gets_as_many_processes_as_it_needs(verify):
    for wanted, processes in ((["plan.tp=2", "plan.pp=2"], 4), (["plan.zero=3", "plan.dp_shard=4"], 4), ([], 2)):
        asked, _, _ = verify(Verdict(compared=9, first=None, largest=FINE), *wanted)
        assert asked[0][2] == processes
