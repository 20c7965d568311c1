"""A small dataset for tests of the feed, and what a program does with it."""

from __future__ import annotations

import numpy as np

from trainfleet.data.loader import LocalBatches


class Numbers:
    """Sample i is {"i": i, "x": i of i}; those in `bad` raise."""

    def __init__(self, length=100, bad=(), shift=0):
        self.length, self.bad, self.shift = length, frozenset(bad), shift

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if index in self.bad:
            raise ValueError(f"{index} is rotten")
        return {"i": index, "x": np.full(50, index + self.shift, np.uint16)}


def jitter(sample, rng):
    return {**sample, "noise": rng.standard_normal(3, np.float32)}


def local(source=None, **settings):
    settings = {"size": 8, "seed": 3, "transform": jitter, "collate": "numpy"} | settings
    return LocalBatches(source if source is not None else Numbers(), **settings)


def same(one, other):
    """Whether two batches are alike to the bit."""
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)
