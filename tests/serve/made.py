"""A model in NumPy, small and exact, and services of it, for tests of what travels between client and service."""

from __future__ import annotations

import time

import numpy as np

from trainfleet.errors import DataError
from trainfleet.serve.terms import Terms

VALIDATE, PREDICT = Terms(task="validate"), Terms(task="predict", top_k=2)


class Weighted:
    """Answers with sums of a batch times its weight; slowly, or not at all, where told so."""

    def __init__(self, weight=3, *, seconds=0.0, wide=1):
        self.weight, self.seconds, self.wide = weight, seconds, wide
        self.asked = 0

    @property
    def digest(self):
        return f"weight-{self.weight}"

    def answer(self, batch, terms):
        self.asked += 1
        time.sleep(self.seconds)
        x = np.asarray(batch["x"])
        if x.ndim != 2:
            raise DataError(f"x has {x.ndim} dimensions, and the model takes 2.", hint="Give [rows, width].")
        if not len(x):
            raise MemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        scores = np.sin(x.astype(np.float64) * self.weight)
        found = {"rows": np.array(len(x)), "first": x[:, 0].copy(), "top": np.array(terms.top_k)}
        return found | {"sums": np.repeat(scores.sum(1), self.wide)}


def batches(count=40, rows=8, width=50):
    for number in range(count):
        yield {"x": np.arange(number, number + rows * width, dtype=np.float32).reshape(rows, width)}


def local(count=40, terms=VALIDATE, weight=3, **shape):
    return [Weighted(weight).answer(batch, terms) for batch in batches(count, **shape)]


def same(one, other):
    """Whether two answers are alike to the bit, dtypes too."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and np.array_equal(one[name], other[name]) for name in one
    )


def all_same(ones, others):
    ones, others = list(ones), list(others)
    return len(ones) == len(others) and all(map(same, ones, others))
