"""Validation: how right a model is, counted over batches, whoever computed them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainfleet.batch import Batch
from trainfleet.errors import ConfigError, DataError, PeerError
from trainfleet.serve.answering import Meant, answering
from trainfleet.serve.one_pass import OnePass, Told
from trainfleet.serve.terms import Answer, Terms

MOST_CELLS = 1 << 26
"""Of a confusion matrix: 512 MiB, 8,192 classes. With more classes there are the sums of each class alone."""
_SHOWN = 20
_WIDTH = 24


@dataclass(frozen=True, kw_only=True, eq=False)
class Validation:
    """Of classes: all but the last three. Of values: `loss`, `mae`, `rmse`, `r2`. What there is not is None.

    As scikit-learn counts: a share of nothing is 0; macro means are over classes that occur as label or prediction.
    """

    rows: int
    """Of the batches, whether they count or not."""
    counted: int
    """Labels: rows, or positions of sequences, that count."""
    loss: float | None = None
    """Sum of totals over sum of weights, as in training."""
    accuracy: float | None = None
    top5_accuracy: float | None = None
    """Labels among the five highest scores; of more than five classes."""
    names: tuple[str, ...] = ()
    """Of the classes."""
    precision: NDArray[np.float64] | None = None
    recall: NDArray[np.float64] | None = None
    f1: NDArray[np.float64] | None = None
    support: NDArray[np.int64] | None = None
    """Labels of each class."""
    macro_precision: float | None = None
    macro_recall: float | None = None
    macro_f1: float | None = None
    confusion: NDArray[np.int64] | None = None
    """[C, C]: rows are the truth, columns what was predicted. None above 8,192 classes."""
    mae: float | None = None
    """Mean absolute error, over all outputs."""
    rmse: float | None = None
    r2: float | None = None
    """Mean over the outputs, of 1 - squared error / squares about the mean of the targets."""

    def to_plain(self) -> dict[str, Any]:
        """As JSON has it; numbers that are not finite become None."""
        return {name: _plain(getattr(self, name)) for name in self.__dataclass_fields__}

    def picture(self, path: str | Path) -> Path:
        """Write the confusion matrix as a PNG; ConfigError where there is none."""
        from trainfleet.serve.picture import draw_confusion

        if self.confusion is None:
            what = (
                "values have no confusion matrix"
                if self.mae is not None
                else f"{len(self.names):,} classes are too many"
            )
            raise ConfigError(f"There is nothing to draw in {path}: {what}.")
        return draw_confusion(self, Path(path))

    def __str__(self) -> str:
        numbers = {
            "loss": self.loss,
            "accuracy": self.accuracy,
            "top-5": self.top5_accuracy,
            "MAE": self.mae,
            "RMSE": self.rmse,
            "R2": self.r2,
        }
        head = "   ".join(f"{name} {value:.4f}" for name, value in numbers.items() if value is not None)
        lines = [f"{head or 'nothing counted'}   of {self.counted:,}"]
        if self.precision is None:
            return lines[0]
        assert self.recall is not None and self.f1 is not None and self.support is not None
        width = min(_WIDTH, max(len("class"), len("mean"), *map(len, self.names)))
        lines += ["", f"{'class':<{width}}  precision  recall      f1   support"]
        order = np.argsort(self.f1, kind="stable") if len(self.names) > _SHOWN else np.arange(len(self.names))
        for c in order[:_SHOWN]:
            name = self.names[c] if len(self.names[c]) <= width else self.names[c][: width - 1] + "…"
            lines.append(_row(name, width, self.precision[c], self.recall[c], self.f1[c], int(self.support[c])))
        if len(self.names) > _SHOWN:
            lines.append(f"… the {_SHOWN} classes of lowest f1, of {len(self.names):,}")
        lines.append(_row("mean", width, self.macro_precision, self.macro_recall, self.macro_f1, self.counted))
        return "\n".join(lines)


def validate(
    model: Meant, batches: Iterable[Batch], *, classes: Sequence[str] | None = None, progress: Told | None = None
) -> Validation:
    """How right `model` is on one pass of `batches`, which have labels.

    model     a Predictor; an nn.Module (then there is no loss); or addresses and tokens of services, to which the
              batches are sent
    batches   a stream, which is rewound and left after one epoch, or any iterable
    classes   their names, in the order of their numbers
    progress  called with (rows done, rows in all or None)

    Rows of weight 0 and labels of -100 count nowhere. DataError where labels and output do not go together; PeerError
    where services are gone for good.
    """
    tally = Tally()
    walk = OnePass(batches, in_order=False)
    with answering(model) as answers:
        for answer, _ in walk.answers(answers, Terms(task="validate"), progress):
            tally.add(answer)
    return tally.result(classes)


class Tally:
    """Adds answers up; its memory does not grow with their number."""

    def __init__(self) -> None:
        self.rows = 0
        self._loss: NDArray[np.float64] | None = None
        self._num_classes: int | None = None
        self._confusion: NDArray[np.int64] | None = None
        self._sums: NDArray[np.int64] | None = None  # [3, C] of more classes: right, labels, predictions
        self._top: int | None = None
        self._count = 0
        self._errors: NDArray[np.float64] | None = None

    def add(self, answer: Answer) -> None:
        self.rows += int(answer["rows"])
        if "loss" in answer:
            self._loss = answer["loss"] + (0.0 if self._loss is None else self._loss)
        if "errors" in answer:
            self._add_errors(int(answer["count"]), answer["errors"])
        else:
            self._add_counts(answer)

    def _add_counts(self, answer: Answer) -> None:
        num_classes = int(answer["num_classes"])
        if self._num_classes not in (None, num_classes) or self._errors is not None:
            raise PeerError(f"Batches were answered with {self._num_classes or 'no'} classes, and now {num_classes}.")
        self._num_classes = num_classes
        truth, predicted = np.divmod(answer["pairs"], num_classes)
        if num_classes**2 <= MOST_CELLS:
            if self._confusion is None:
                self._confusion = np.zeros((num_classes, num_classes), np.int64)
            self._confusion[truth, predicted] += answer["counts"]  # each pair stands once in an answer
        else:
            if self._sums is None:
                self._sums = np.zeros((3, num_classes), np.int64)
            right = truth == predicted
            np.add.at(self._sums[0], truth[right], answer["counts"][right])
            np.add.at(self._sums[1], truth, answer["counts"])
            np.add.at(self._sums[2], predicted, answer["counts"])
        self._count += int(answer["counts"].sum())
        if "top" in answer:
            self._top = int(answer["top"]) + (self._top or 0)

    def _add_errors(self, count: int, errors: NDArray[np.float64]) -> None:
        """Squares about the mean are joined as Chan, Golub and LeVeque do (1979), which keeps their digits."""
        if self._num_classes is not None or (self._errors is not None and errors.shape != self._errors.shape):
            raise PeerError("Batches were answered with other outputs than those before.")
        if self._errors is None:
            self._errors, self._count = errors.copy(), count
        elif count:
            whole, delta = self._count + count, errors[2] - self._errors[2]
            self._errors[:2] += errors[:2]
            self._errors[3] += errors[3] + delta**2 * self._count * count / whole
            self._errors[2] += delta * count / whole
            self._count = whole

    def result(self, classes: Sequence[str] | None) -> Validation:
        if self.rows == 0:
            raise DataError("There were no batches, so nothing was validated. Look at the data.")
        loss = None
        if self._loss is not None:
            loss = float(self._loss[0] / self._loss[1]) if self._loss[1] else 0.0
        common: dict[str, Any] = {"rows": self.rows, "counted": self._count, "loss": loss}
        return Validation(**common, **(self._values() if self._errors is not None else self._scores(classes)))

    def _values(self) -> dict[str, Any]:
        assert self._errors is not None
        count, (absolute, squares, _, about) = max(self._count, 1), self._errors
        # scikit-learn's r2_score: targets that are all alike give 1 where they are met, else 0.
        alike = np.where(squares == 0, 1.0, 0.0)
        r2 = np.where(about > 0, 1.0 - squares / np.where(about > 0, about, 1.0), alike)
        return {
            "mae": float(absolute.mean() / count),
            "rmse": math.sqrt(squares.mean() / count),
            "r2": float(r2.mean()) if self._count > 1 else None,
        }

    def _scores(self, classes: Sequence[str] | None) -> dict[str, Any]:
        num_classes, confusion = self._num_classes or 0, self._confusion
        names = tuple(map(str, classes)) if classes is not None else tuple(map(str, range(num_classes)))
        if len(names) != num_classes:
            raise ConfigError(f"{len(names)} names of classes are given, and the model has {num_classes} classes.")
        if confusion is not None:
            right, support, predicted = np.diagonal(confusion), confusion.sum(1), confusion.sum(0)
        else:
            assert self._sums is not None
            right, support, predicted = self._sums
        precision, recall = _share(right, predicted), _share(right, support)
        f1 = _share(2 * right, predicted + support)
        occurs = (predicted + support) > 0
        mean = {
            name: float(of[occurs].mean()) if occurs.any() else None
            for name, of in (("precision", precision), ("recall", recall), ("f1", f1))
        }
        return {
            "accuracy": float(right.sum() / self._count) if self._count else None,
            "top5_accuracy": self._top / self._count if self._top is not None and self._count else None,
            "names": names,
            "precision": precision,
            "recall": recall,
            "f1": f1,
            "support": support,
            **{f"macro_{name}": value for name, value in mean.items()},
            "confusion": confusion,
        }


def _share(part: NDArray[np.int64], whole: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.divide(part, whole, out=np.zeros(len(whole)), where=whole > 0)


def _row(name: str, width: int, precision: Any, recall: Any, f1: Any, support: int) -> str:
    shown = [f"{value:.4f}" if value is not None else "-" for value in (precision, recall, f1)]
    return f"{name:<{width}}  {shown[0]:>9}  {shown[1]:>6}  {shown[2]:>6}  {support:>8,}"


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return list(value) if isinstance(value, tuple) else value
