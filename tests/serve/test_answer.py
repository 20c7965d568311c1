"""An answer from another host is one to what was asked, or is refused before it is used."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainfleet.errors import DataError, PeerError
from trainfleet.serve.answer import checked_answer
from trainfleet.serve.terms import Terms
from trainfleet.serve.validation import Tally

VALIDATE, PREDICT = Terms(task="validate"), Terms(task="predict", top_k=2, probabilities=True)
COUNTED = {
    "rows": np.array(4),
    "loss": np.array([2.0, 4.0]),
    "num_classes": np.array(6),
    "pairs": np.array([0, 7, 35]),
    "counts": np.array([1, 2, 1]),
    "top": np.array(3),
}
MEASURED = {"rows": np.array(4), "count": np.array(3), "errors": np.ones((4, 2))}
RANKED = {
    "rows": np.array(4),
    "num_classes": np.array(3),
    "kept": np.array([0, 3], np.int32),
    "classes": np.array([[0, 2], [1, 0]], np.int32),
    "confidences": np.ones((2, 2), np.float32),
    "probabilities": np.ones((2, 3), np.float32),
}
VALUES = {"rows": np.array(4), "kept": np.array([1], np.int32), "values": np.ones((1, 5), np.float32)}


def test_answers_are_taken():
    for answer, terms in ((COUNTED, VALIDATE), (MEASURED, VALIDATE), (RANKED, PREDICT), (VALUES, PREDICT)):
        assert checked_answer(answer, terms) == answer


@pytest.mark.parametrize(
    ("answer", "terms", "wrong"),
    [
        (COUNTED, VALIDATE, {"rows": np.array(-1)}),
        (COUNTED, VALIDATE, {"rows": np.array(4, np.int32)}),
        (COUNTED, VALIDATE, {"rows": np.array([4])}),
        (COUNTED, VALIDATE, {"loss": np.array([1.0])}),
        (COUNTED, VALIDATE, {"num_classes": np.array(5)}),
        (COUNTED, VALIDATE, {"num_classes": np.array(1 << 40)}),
        (COUNTED, VALIDATE, {"pairs": np.array([0, 7, 36])}),
        (COUNTED, VALIDATE, {"pairs": np.array([7, 0, 35])}),
        (COUNTED, VALIDATE, {"pairs": np.array([-1, 7, 35])}),
        (COUNTED, VALIDATE, {"counts": np.array([1, -2, 1])}),
        (COUNTED, VALIDATE, {"counts": np.array([1, 2])}),
        (COUNTED, VALIDATE, {"top": np.array(5)}),
        (COUNTED, VALIDATE, {"more": np.array(5)}),
        (COUNTED, VALIDATE, {"pairs": None}),
        (COUNTED, VALIDATE, {"pairs": [0, 7, 35]}),
        (MEASURED, VALIDATE, {"errors": np.ones((3, 2))}),
        (MEASURED, VALIDATE, {"errors": -np.ones((4, 2))}),
        (MEASURED, VALIDATE, {"count": np.array(5)}),
        (MEASURED, VALIDATE, {"count": np.array(0)}),
        (RANKED, PREDICT, {"kept": np.array([0, 4], np.int32)}),
        (RANKED, PREDICT, {"kept": np.array([3, 0], np.int32)}),
        (RANKED, PREDICT, {"kept": np.array([1, 1], np.int32)}),
        (RANKED, PREDICT, {"classes": np.array([[0, 3], [1, 0]], np.int32)}),
        (RANKED, PREDICT, {"confidences": np.ones((2, 3), np.float32)}),
        (RANKED, PREDICT, {"probabilities": np.ones((2, 4), np.float32)}),
        (RANKED, PREDICT, {"more": np.array(1)}),
        (RANKED, Terms(task="predict", top_k=2), {}),
        (RANKED, VALIDATE, {}),
        (COUNTED, PREDICT, {}),
        (VALUES, PREDICT, {"values": np.ones((2, 5), np.float32)}),
        (VALUES, PREDICT, {"values": np.ones((1, 5))}),
    ],
)
def test_answers_that_cannot_be_are_refused(answer, terms, wrong):
    with pytest.raises(PeerError):
        checked_answer({key: value for key, value in {**answer, **wrong}.items() if value is not None}, terms)
    with pytest.raises(PeerError):
        checked_answer(list(answer), terms)


ARRAYS = st.builds(
    lambda values, dtype, shape: np.resize(np.array(values or [0], np.int64), shape).astype(dtype),
    st.lists(st.integers(-(1 << 62), 1 << 62), max_size=6),
    st.sampled_from([np.int64, np.int32, np.float32, np.float64, np.bool_]),
    st.sampled_from([(), (1,), (2,), (3,), (4, 2), (2, 2), (2, 3)]),
)


@given(ARRAYS, st.sampled_from(sorted({*COUNTED, *MEASURED})), st.booleans())
def test_whatever_comes_is_refused_or_can_be_added_up(array, key, measured):
    with contextlib.suppress(PeerError, DataError):  # a batch of no rows is nothing to add up
        answer = checked_answer({**(MEASURED if measured else COUNTED), key: array}, VALIDATE)
        if int(answer.get("num_classes", 0)) < 4096:
            tally = Tally()
            tally.add(answer)
            tally.result(None)


@given(ARRAYS, st.sampled_from(sorted({*RANKED, *VALUES})), st.booleans())
def test_whatever_comes_names_rows_and_classes_that_are_there(array, key, values):
    with contextlib.suppress(PeerError):
        answer = checked_answer({**(VALUES if values else RANKED), key: array}, PREDICT)
        assert (answer["kept"] < int(answer["rows"])).all()
        assert "values" in answer or (answer["classes"] < int(answer["num_classes"])).all()
