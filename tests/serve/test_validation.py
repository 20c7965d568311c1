"""What validate counts is what scikit-learn counts, and what the loop of training would have as loss."""

from __future__ import annotations

import json

import numpy as np
import pytest
from numpy.testing import assert_allclose

metrics = pytest.importorskip("sklearn.metrics", reason="the oracle is scikit-learn")
torch = pytest.importorskip("torch", reason="models are torch's")
from serving import Points, linear, stream, summed  # noqa: E402
from torch.nn import functional  # noqa: E402

from trainfleet.errors import ConfigError, DataError, PeerError  # noqa: E402
from trainfleet.serve import validation  # noqa: E402
from trainfleet.serve.predictor import Predictor  # noqa: E402
from trainfleet.serve.validation import Tally, validate  # noqa: E402


def scores(points: Points, model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.tensor(points.inputs))


@pytest.mark.parametrize("num_classes", [2, 7, 200])
@pytest.mark.parametrize("most_cells", [validation.MOST_CELLS, 1])
def test_classes_are_counted_as_scikit_learn_does(num_classes, most_cells, monkeypatch):
    monkeypatch.setattr(validation, "MOST_CELLS", most_cells)
    points = Points(num_classes=num_classes)
    found = validate(Predictor(linear(num_classes), loss_fn=summed), stream(points))
    logits = scores(points, linear(num_classes))
    truth, predicted = points.labels, logits.argmax(-1).numpy()
    each = metrics.precision_recall_fscore_support(truth, predicted, labels=range(num_classes), zero_division=0)
    for ours, theirs in zip((found.precision, found.recall, found.f1, found.support), each):
        assert_allclose(ours, theirs, rtol=1e-12)
    macro = metrics.precision_recall_fscore_support(truth, predicted, average="macro", zero_division=0)[:3]
    assert_allclose([found.macro_precision, found.macro_recall, found.macro_f1], macro, rtol=1e-12)
    assert found.accuracy == pytest.approx(metrics.accuracy_score(truth, predicted), abs=1e-15)
    if num_classes > 5:
        top = metrics.top_k_accuracy_score(truth, logits.numpy(), k=5, labels=range(num_classes))
        assert found.top5_accuracy == pytest.approx(top, abs=1e-15)
    else:
        assert found.top5_accuracy is None
    if most_cells == 1:
        assert found.confusion is None
    else:
        assert (found.confusion == metrics.confusion_matrix(truth, predicted, labels=range(num_classes))).all()
        assert found.confusion.dtype == np.int64
    assert found.loss == pytest.approx(float(functional.cross_entropy(logits, torch.tensor(truth))), rel=1e-6)
    assert (found.rows, found.counted) == (103, 103)


class Values(Points):
    """Two targets far from zero, where squares about the mean lose their digits if summed plainly."""

    def __getitem__(self, index):
        return {"input": self.inputs[index], "target": (self.inputs[index, :2] * [0.1, 3] + 1e4).astype(np.float32)}


def test_values_are_measured_as_scikit_learn_does():
    points = Values()
    model = linear(2)
    with torch.no_grad():
        model[-1].bias += 1e4
    found = validate(model, stream(points))
    truth = np.stack([points[i]["target"] for i in range(103)]).astype(np.float64)
    told = scores(points, model).double().numpy()
    assert found.mae == pytest.approx(metrics.mean_absolute_error(truth, told), rel=1e-9)
    assert found.rmse == pytest.approx(metrics.mean_squared_error(truth, told) ** 0.5, rel=1e-9)
    assert found.r2 == pytest.approx(metrics.r2_score(truth, told), rel=1e-9)
    assert found.accuracy is None and found.loss is None and "R2" in str(found)


def test_a_module_has_its_modes_of_training_back():
    model = linear().train()
    model[1].eval()
    first = validate(model, stream())
    assert model.training and model[0].training and not model[1].training
    assert (validate(model, stream()).confusion == first.confusion).all(), "dropout was on"


@pytest.mark.parametrize("size", [1, 50, 103, 200])
def test_the_result_does_not_depend_on_batches_and_streams_may_be_endless(size):
    batches = stream(size=size)
    found = validate(linear(), batches)
    assert (found.confusion == validate(linear(), stream(epochs=1)).confusion).all()
    assert (validate(linear(), batches).confusion == found.confusion).all(), "a stream begins anew each time"
    assert (validate(linear(), list(stream(epochs=1))).confusion == found.confusion).all()
    once = stream(size=size, epochs=1)
    assert validate(linear(), once).rows == validate(linear(), once).rows == 103


def test_a_stream_that_drops_its_end_says_so(caplog):
    from trainfleet.data import LocalBatches

    found = validate(linear(), LocalBatches(Points(), size=8, shuffle=True, short="drop"))
    assert found.rows == 96 and "last 7 samples" in caplog.text


def test_progress_is_told_after_each_batch():
    seen = []
    validate(linear(), stream(size=50), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(50, 103), (100, 103), (103, 103)]
    seen.clear()
    validate(linear(), list(stream(size=103, epochs=1)), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(103, None)]


def test_the_table_is_calm_and_json_takes_the_rest():
    found = validate(Predictor(linear(), loss_fn=summed), stream(), classes="abcdefg")
    lines = str(found).splitlines()
    assert lines[0].startswith("loss ") and lines[0].endswith("of 103") and len(lines) == 11
    assert (
        lines[2].split() == ["class", "precision", "recall", "f1", "support"] and len({len(s) for s in lines[2:]}) == 1
    )
    plain = json.loads(json.dumps(found.to_plain(), allow_nan=False))
    assert plain["names"] == list("abcdefg") and plain["confusion"] == found.confusion.tolist()
    many = validate(linear(40), stream(Points(num_classes=40)))
    assert "the 20 classes of lowest f1, of 40" in str(many) and len(str(many).splitlines()) == 25


def test_names_of_other_classes_are_refused():
    with pytest.raises(ConfigError, match="3 names of classes are given, and the model has 7"):
        validate(linear(), stream(), classes="abc")


def test_nothing_to_validate_is_said():
    with pytest.raises(DataError, match="no batches"):
        validate(linear(), [])
    left_out = validate(linear(), [{"input": torch.zeros(2, 6), "target": torch.full((2,), -100)}])
    assert left_out.counted == 0 and left_out.accuracy is None and str(left_out)


def test_answers_of_unlike_models_are_not_added_up():
    def counted(num_classes):
        one = np.array([0]), np.array([1])
        return {"rows": np.array(1), "num_classes": np.array(num_classes), "pairs": one[0], "counts": one[1]}

    tally = Tally()
    tally.add(counted(3))
    with pytest.raises(PeerError, match="3 classes, and now 4"):
        tally.add(counted(4))
    with pytest.raises(PeerError):
        tally.add({"rows": np.array(1), "count": np.array(1), "errors": np.zeros((4, 1))})


def test_what_has_no_matrix_has_no_picture(tmp_path):
    with pytest.raises(ConfigError, match="nothing to draw"):
        validate(linear(2), stream(Values())).picture(tmp_path / "a.png")
