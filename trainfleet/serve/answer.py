"""The answer for one batch: what belongs in it, checked where it arrives, for it may come from another host."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from trainfleet.errors import ConfigError, PeerError
from trainfleet.serve.terms import MOST_CLASSES, Answer, Terms

_ROWS = 1 << 40


def checked_answer(answer: Any, terms: Terms) -> Answer:
    """`answer`, if it is one to `terms`; PeerError otherwise.

    Always `rows` int64 [], how many the batch has. To validate, `loss` float64 [2] (total, weight) where there is a
    loss, and of classes `num_classes`, `pairs` and `counts` int64 [m] (label * C + predicted, ascending; how often),
    with `top` int64 [] where C > 5 (labels among the five highest scores); of values `count` int64 [] and `errors`
    float64 [4, D] (sums of |error| and its square, mean of targets, squares about it). To predict, `kept` int32 [r]
    (rows within the batch, ascending), and of classes `num_classes`, `classes` int32 [r, k], `confidences` float32
    [r, k], `probabilities` float32 [r, C] where asked for; of values `values` float32 [r, ...].
    """
    if not isinstance(answer, Mapping) or not all(isinstance(array, np.ndarray) for array in answer.values()):
        raise PeerError(f"An answer is a {type(answer).__name__}, not arrays by name.")
    found: Answer = dict(answer)
    rows = _number(found, "rows", _ROWS)
    if terms.task == "predict":
        _check_rows(found, terms, rows)
    else:
        _check_scores(found, rows)
    return found


def _check_scores(answer: Answer, rows: int) -> None:
    if "loss" in answer:
        _array(answer, "loss", np.float64, (2,))
    if "errors" not in answer:
        num_classes = _number(answer, "num_classes", MOST_CLASSES)
        pairs, counts = (_array(answer, name, np.int64, (None,)) for name in ("pairs", "counts"))
        total = int(counts.sum())
        ordered = (np.diff(pairs) > 0).all() and (counts > 0).all() and (counts <= _ROWS).all()
        inside = not len(pairs) or (pairs[0] >= 0 and pairs[-1] < num_classes**2)
        if len(pairs) != len(counts) or not ordered or not inside or _number(answer, "top", total, default=0) > total:
            raise PeerError("An answer counts classes that cannot be.")
        _refuse_others(answer, {"rows", "loss", "num_classes", "pairs", "counts", "top"})
        return
    count = _number(answer, "count", rows)
    errors = _array(answer, "errors", np.float64, (4, None))
    if (errors[[0, 1, 3]] < 0).any() or (not count and errors[[0, 1, 3]].any()):
        raise PeerError("An answer has errors that cannot be.")
    _refuse_others(answer, {"rows", "loss", "count", "errors"})


def _check_rows(answer: Answer, terms: Terms, rows: int) -> None:
    kept = _array(answer, "kept", np.int32, (None,))
    if len(kept) and (kept[0] < 0 or kept[-1] >= rows or (np.diff(kept) <= 0).any()):
        raise PeerError(f"An answer names rows that a batch of {rows} does not have.")
    if "values" in answer:
        values = answer["values"]
        if values.dtype != np.float32 or values.ndim < 1 or len(values) != len(kept):
            raise PeerError(f"An answer has {len(kept)} rows with values {values.dtype} {values.shape}.")
        _refuse_others(answer, {"rows", "kept", "values"})
        return
    num_classes = _number(answer, "num_classes", MOST_CLASSES)
    classes = _array(answer, "classes", np.int32, (len(kept), terms.top_k))
    _array(answer, "confidences", np.float32, (len(kept), terms.top_k))
    if terms.probabilities:
        _array(answer, "probabilities", np.float32, (len(kept), num_classes))
    if classes.size and (classes.min() < 0 or classes.max() >= num_classes):
        raise PeerError(f"An answer names classes from {classes.min()} to {classes.max()} of {num_classes}.")
    wanted = {"rows", "kept", "num_classes", "classes", "confidences"}
    _refuse_others(answer, wanted | ({"probabilities"} if terms.probabilities else set()))


def _number(answer: Answer, name: str, most: int, *, default: int | None = None) -> int:
    if name not in answer and default is not None:
        return default
    value = int(_array(answer, name, np.int64, ())[()])
    if not 0 <= value <= most:
        raise PeerError(f"An answer has {value} as {name}; 0 to {most} could be.")
    return value


def _array(answer: Answer, name: str, dtype: Any, shape: tuple[int | None, ...]) -> Any:
    array = answer.get(name)
    if array is None:
        raise PeerError(f"An answer lacks {name}; it has {', '.join(answer)}.")
    fits = len(array.shape) == len(shape) and all(want in (None, got) for want, got in zip(shape, array.shape))
    if array.dtype != dtype or not fits:
        raise PeerError(f"An answer has {name} as {array.dtype} {array.shape}, not {np.dtype(dtype)} {shape}.")
    return array


def _refuse_others(answer: Answer, known: set[str]) -> None:
    if others := set(answer) - known:
        raise PeerError(f"An answer has {', '.join(map(repr, sorted(others)))[:80]}, which nobody asked for.")


def check_names(names: tuple[str, ...] | None, answer: Answer) -> None:
    """ConfigError where names are given, and there are not as many classes."""
    if names is not None and "num_classes" in answer and int(answer["num_classes"]) != len(names):
        raise ConfigError(
            f"{len(names)} names of classes are given, and the model has {int(answer['num_classes'])} classes."
        )
