"""A recipe's model answers as its run evaluated it, and its data come in order to the last sample."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn", reason="the data are scikit-learn's digits")

from trainfleet.config import load_config  # noqa: E402
from trainfleet.data import LocalBatches  # noqa: E402
from trainfleet.errors import CheckpointError, ConfigError  # noqa: E402
from trainfleet.serve import predict, validate  # noqa: E402
from trainfleet.training import job  # noqa: E402
from trainfleet.training.feed import as_fed, service_of  # noqa: E402
from trainfleet.training.inference import batches_of, class_names, predictor_of  # noqa: E402
from trainfleet.training.recipe import Recipe  # noqa: E402

RECIPES = Path(__file__).parents[2] / "recipes"


def read(folder: Path, *overrides: str) -> Recipe:
    sys.path[:0] = [] if str(RECIPES) in sys.path else [str(RECIPES)]
    given = [f"folder={folder}", "train.steps=12", "checkpoint.every=12", "monitor.console=false", *overrides]
    return load_config(Recipe, file=RECIPES / "digits.yaml", overrides=given, env={}).value


def evaluated(folder: Path) -> float:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["event"] == "Evaluated"][-1]


@pytest.mark.parametrize("override", ["train.ema_decay=null", "train.ema_decay=0.9", "plan.precision=bf16"])
def test_validation_has_the_loss_that_the_run_evaluated(tmp_path, override):
    recipe = read(tmp_path, override)
    job.run(recipe)
    found = validate(predictor_of(recipe, device="cpu"), batches_of(recipe))
    assert found.loss == pytest.approx(evaluated(tmp_path), rel=1e-6) and found.rows == 360
    if "ema" in override and "null" not in override:
        raw = validate(predictor_of(read(tmp_path), device="cpu"), batches_of(recipe))
        assert raw.loss != pytest.approx(found.loss, rel=1e-3), "the averages were not taken"


def test_weights_come_from_where_they_are_said_to_be(tmp_path):
    recipe = read(tmp_path / "run", "checkpoint.keep_last=5", "checkpoint.every=4")
    job.run(recipe)
    newest = predictor_of(recipe, device="cpu").digest
    steps = [
        predictor_of(recipe, str(path), "cpu").digest for path in sorted((tmp_path / "run/checkpoints").glob("s*"))
    ]
    assert len(set(steps)) == 3 and steps[-1] == newest
    torch.save(predictor_of(recipe, device="cpu").model.state_dict(), tmp_path / "weights.pt")
    other = read(tmp_path / "nowhere")
    assert predictor_of(other, str(tmp_path / "weights.pt"), "cpu").digest == newest
    with pytest.raises(CheckpointError, match=r"no weights in .*nowhere") as refused:
        predictor_of(other)
    assert "--weights" in refused.value.hint


def digits(**overrides: Any) -> Recipe:
    return read(Path("nowhere"), *(f"{key.replace('__', '.')}={value}" for key, value in overrides.items()))


@pytest.mark.parametrize(("stream", "count"), [("evaluation", 360), ("training", 1437)])
@pytest.mark.parametrize("workers", [0, 2])
def test_data_come_in_order_to_the_last_sample(stream, count, workers):
    with batches_of(digits(data__workers=workers), stream) as batches:
        labels = np.concatenate([batch["target"].numpy() for batch in batches])
        assert len(batches.worker_pids) == workers
    from handwritten_digits import Digits

    source = Digits(held_out=stream == "evaluation")
    assert labels.tolist() == [source[i]["target"] for i in range(count)]


def test_only_iterated_data_end_too(tmp_path, monkeypatch):
    (tmp_path / "lines.py").write_text("class Lines:\n    def __iter__(self):\n        return iter(range(70))\n")
    monkeypatch.syspath_prepend(tmp_path)
    recipe = digits(data__source="lines:Lines", data__args="{}", batch__micro_batch=32)
    found = list(batches_of(recipe, "training"))
    assert [len(batch) for batch in found] == [32, 32, 6] and torch.cat(found).tolist() == list(range(70))


def test_what_is_not_there_is_refused():
    with pytest.raises(ConfigError, match=r"data\.evaluation is not set") as refused:
        batches_of(digits(data__evaluation="null"))
    assert "--stream training" in refused.value.hint
    with pytest.raises(ConfigError, match="The stream is 'test'"):
        batches_of(digits(), "test")


def test_mean_squares_mean_values(tmp_path, monkeypatch):
    (tmp_path / "lots.py").write_text(
        "import torch\n"
        "class Lots:\n"
        "    def __init__(self, held_out=False): pass\n"
        "    def __len__(self): return 50\n"
        "    def __getitem__(self, i): return torch.full((3,), float(i)), torch.tensor([2.0 * i])\n"
        "def model():\n"
        "    return torch.nn.Linear(3, 1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    recipe = read(tmp_path / "run", "loss=mse", "model.name=lots:model", "model.args={}", "data.source=lots:Lots",
                  "data.args={}", "data.evaluation={source: 'lots:Lots'}", "data.on_device=null",
                  "data.on_device_args={}")  # fmt: skip
    job.run(recipe)
    predictor = predictor_of(recipe, device="cpu")
    found = validate(predictor, batches_of(recipe))
    assert found.rmse**2 == pytest.approx(found.loss, rel=1e-6) and found.accuracy is None
    assert predict(predictor, batches_of(recipe)).values.shape == (50,)


def test_a_source_tells_the_names_of_its_classes():
    class Named(list):
        classes = ["a", "b"]  # noqa: RUF012

    assert class_names(LocalBatches(Named([1, 2]), size=1)) == ("a", "b")
    assert class_names(batches_of(digits())) is None


@pytest.mark.parametrize("stream", ["evaluation", "training"])
def test_data_that_others_feed_are_asked_in_the_same_order(stream):
    local = digits(data__workers=1)
    with service_of(local, address="127.0.0.1:0").open() as service:
        fed = as_fed(local, feeders=[str(service.address)])
        with batches_of(fed, stream) as batches:
            found = predict(Labels(), batches)
    with batches_of(local, stream) as batches:
        wanted = predict(Labels(), batches)
    assert found.rows == wanted.rows == (360 if stream == "evaluation" else 1437)
    assert (found.values == wanted.values).all() and (found.indices == wanted.indices).all()


class Labels:
    """An Answering that says of each row what its label is."""

    digest = "labels"

    def answers(self, batches, terms):
        for batch in batches:
            labels = np.asarray(batch["target"])
            kept = np.arange(len(labels), dtype=np.int32)
            yield {"rows": np.array(len(labels)), "kept": kept, "values": labels.astype(np.float32)}
