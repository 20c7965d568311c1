"""What an output stands for is found by labels and shapes, or said."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="outputs are torch's")
from trainfleet.errors import DataError  # noqa: E402
from trainfleet.serve.outputs import in_float32, labels_of, prediction, read_output  # noqa: E402

FLOATS, INTEGERS = torch.zeros(4), torch.zeros(4, dtype=torch.long)


@pytest.mark.parametrize(
    ("shape", "labels", "classes", "kind", "scores"),
    [
        ((4, 3), INTEGERS, None, "classes", (4, 3)),
        ((4, 3), None, None, "classes", (4, 3)),
        ((4, 3), None, 3, "classes", (4, 3)),
        ((4, 3), None, 0, "values", (4, 3)),
        ((4, 1), INTEGERS, None, "classes", (4, 2)),
        ((4,), INTEGERS, None, "classes", (4, 2)),
        ((4,), None, 2, "classes", (4, 2)),
        ((4, 1), FLOATS, None, "values", (4, 1)),
        ((4, 5, 3), INTEGERS[:, None].expand(4, 5), None, "classes", (4, 5, 3)),
        ((4, 5), INTEGERS[:, None].expand(4, 5), None, "classes", (4, 5, 2)),
    ],
)
def test_an_output_is_read(shape, labels, classes, kind, scores):
    reading = read_output(torch.zeros(shape), labels, 4, classes)
    assert reading.kind == kind and tuple(reading.scores.shape) == scores


@pytest.mark.parametrize(
    ("output", "classes"), [(torch.zeros(4, 3), 2), (torch.zeros(4, 1), 3), (torch.zeros(4, 3, dtype=torch.long), 3)]
)
def test_an_output_of_other_classes_is_refused(output, classes):
    with pytest.raises(DataError):
        read_output(output, None, 4, classes)


def test_labels_are_found_where_batches_have_them():
    assert labels_of({"x": 1, "labels": 2}) == 2 and labels_of((1, 2)) == 2 and labels_of({"x": 1}) is None
    assert labels_of(torch.zeros(3)) is None


def test_the_prediction_is_the_logits_or_the_first():
    assert (
        prediction({"logits": FLOATS}) is FLOATS and prediction((FLOATS, 1)) is FLOATS and prediction(FLOATS) is FLOATS
    )
    assert in_float32({"logits": FLOATS.bfloat16()})["logits"].dtype == torch.float32
