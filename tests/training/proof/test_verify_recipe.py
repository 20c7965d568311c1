from __future__ import annotations

import pickle
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="a case holds batches of tensors")

from trainfleet.config import load_config  # noqa: E402
from trainfleet.training.proof.verify_recipe import case_of  # noqa: E402
from trainfleet.training.recipe import Recipe  # noqa: E402

TINY = """
import numpy as np
from torch import nn

class Tiny(nn.Linear):
    def __init__(self, width):
        super().__init__(width, 1)

class Numbers:
    def __len__(self):
        return 40
    def __getitem__(self, index):
        return {"input": np.full(3, index, np.float32), "target": np.ones(1, np.float32)}
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A recipe whose model and data lie in a module of their own."""
    (tmp_path / "tiny_case.py").write_text(TINY)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])

    def load(**values):
        given = {
            "model": {"name": "tiny_case:Tiny", "args": {"width": 3}},
            "data.source": "tiny_case:Numbers",
            "batch": {"micro_batch": 2, "accumulation": 2},
            "optimizer": {"name": "sgd", "lr": 0.5, "lr_reference_batch": 4},
            "loss": "mse",
        }
        return load_config(Recipe, values={**given, **values}, env={}).value

    yield load
    sys.modules.pop("tiny_case", None)


def inputs(case, count):
    return [np.asarray(case.micro_batch(number)["input"])[:, 0].tolist() for number in range(count)]


def test_a_case_has_the_recipes_numbers(recipe):
    case = case_of(recipe(**{"train.seed": 7, "train.clip_norm": 0.5}), 2, steps=2, accumulation=2)
    assert (case.steps, case.accumulation, case.seed, case.clip_norm) == (2, 2, 7, 0.5)
    model = case.build()
    assert model.weight.shape == (1, 3)
    assert case.optimizer(model).param_groups[0]["lr"] == 1.0, "scaled to the global batch of 8"


def test_the_batches_are_each_sample_once_in_the_order_of_the_seed(recipe):
    seen = inputs(case_of(recipe(), 2, steps=2, accumulation=2), 8)
    assert all(len(batch) == 2 for batch in seen)
    assert len({sample for batch in seen for sample in batch}) == 16
    assert seen == inputs(case_of(recipe(), 2, steps=2, accumulation=2), 8)
    assert seen != inputs(case_of(recipe(**{"train.seed": 1}), 2, steps=2, accumulation=2), 8)


def test_a_case_can_be_sent_to_ranks(recipe):
    case = case_of(recipe(), 2, steps=1, accumulation=2)
    again = pickle.loads(pickle.dumps(case))
    assert inputs(again, 4) == inputs(case, 4)
    assert again.build().weight.shape == (1, 3)


def test_a_recipe_holds_on_two_processes(recipe):
    from trainfleet.training.proof.verify_recipe import verify_recipe

    verdict = verify_recipe(recipe(**{"plan.zero": 3, "optimizer.lr": 1e-4}), 2, steps=2)
    assert verdict.holds, str(verdict)
