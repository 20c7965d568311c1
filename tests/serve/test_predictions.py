"""Predictions are those of a plain loop, row by row, and take the memory that was said before."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="models are torch's")
from serving import Points, linear, stream  # noqa: E402

from trainfleet.data.split import Part  # noqa: E402
from trainfleet.errors import ConfigError  # noqa: E402
from trainfleet.serve import predictions  # noqa: E402
from trainfleet.serve.one_pass import OnePass  # noqa: E402
from trainfleet.serve.predictions import Predictions, predict  # noqa: E402
from trainfleet.serve.predictor import Predictor  # noqa: E402


def plain(outputs: int = 7) -> torch.Tensor:
    with torch.no_grad():
        return linear(outputs).eval()(torch.tensor(Points().inputs)).softmax(-1)


@pytest.mark.parametrize("size", [1, 8, 103])
@pytest.mark.parametrize("known", [True, False])
def test_predictions_are_those_of_a_plain_loop(size, known):
    batches = stream(size=size) if known else iter(list(stream(size=size, epochs=1)))
    found = predict(linear(), batches, top_k=3, probabilities=True, classes="abcdefg")
    best, classes = plain().topk(3)
    assert found.indices.tolist() == list(range(103)) and found.rows == len(found) == 103
    assert (found.classes == classes.numpy()).all() and found.names == tuple("abcdefg")
    np.testing.assert_allclose(found.confidences, best.numpy(), rtol=1e-5)
    np.testing.assert_allclose(found.probabilities, plain().numpy(), rtol=1e-5)
    kinds = [found.indices.dtype, found.classes.dtype, found.confidences.dtype, found.probabilities.dtype]
    assert kinds == [np.int64, np.int32, np.float32, np.float32]
    assert found.measured_bytes == 103 * (8 + 3 * 8 + 7 * 4)
    assert found.estimated_bytes == (found.measured_bytes if known else None)


def test_a_threshold_filters_and_the_estimate_is_an_upper_bound(caplog):
    caplog.set_level("INFO", predictions.logger.name)
    found = predict(linear(), stream(), confidence=0.25)
    best = plain().max(-1).values
    assert found.indices.tolist() == (best >= 0.25).nonzero().flatten().tolist()
    assert 0 < len(found) < 103 and found.measured_bytes == len(found) * 16 < found.estimated_bytes == 103 * 16
    assert "at most 2 kB" in caplog.text and f"{len(found)} of 103 rows" in caplog.text
    none = predict(linear(), stream(), confidence=1.0)
    assert len(none) == 0 and none.classes.shape == (0, 1) and none.rows == 103


def test_indices_are_positions_in_the_dataset_where_samples_are_skipped():
    class Bad(Points):
        def __getitem__(self, index):
            if index in (0, 9, 102):
                raise OSError("unreadable")
            return super().__getitem__(index)

    with stream(Bad(), bad="skip") as batches:
        found = predict(linear(), batches)
    assert found.indices.tolist() == [i for i in range(103) if i not in (0, 9, 102)]
    assert (found.classes[:, 0] == plain().argmax(-1).numpy()[found.indices]).all()


def test_values_are_predicted():
    found = predict(Predictor(linear(2), classes=0), stream())
    assert found.values.shape == (103, 2) and found.classes is None and found.measured_bytes == 103 * 16
    with torch.no_grad():
        np.testing.assert_allclose(
            found.values, linear(2).eval()(torch.tensor(Points().inputs)).numpy(), rtol=1e-5, atol=1e-6
        )


def test_what_does_not_fit_into_memory_is_refused_before_it_is_computed(monkeypatch):
    monkeypatch.setattr(predictions, "free_bytes", lambda: 1000)
    asked = []
    with pytest.raises(ConfigError, match="take 2 kB, and 1 kB of memory are free") as refused:
        predict(linear(), stream(), progress=lambda done, total: asked.append(done))
    assert "to=" in refused.value.hint and asked == []


def test_names_of_other_classes_are_refused_at_the_first_batch():
    asked = []
    with pytest.raises(ConfigError, match="3 names"):
        predict(linear(), stream(), classes="abc", progress=lambda *told: asked.append(told))
    assert asked == []


def test_no_batches_are_no_predictions():
    found = predict(linear(), [])
    assert isinstance(found, Predictions) and len(found) == 0 and found.classes is None and "0 of 0" in str(found)


def test_indices_of_a_part_are_those_of_the_whole():
    whole = predict(linear(), stream())
    parts = [Part(Points(), 0.2, held_out=held_out) for held_out in (True, False)]
    found = [predict(linear(), stream(part=part)) for part in parts]
    assert len(found[0]) == 21 and sorted([*found[0].indices, *found[1].indices]) == list(range(103))
    for one in found:
        assert (one.classes == whole.classes[one.indices]).all()
    assert len({OnePass(stream(part=part), in_order=True).first_digest() for part in (*parts, None)}) == 3
