"""Spread one model over the ranks of a mesh, and run it there."""

from trainfleet.parallel.apply import parallelize
from trainfleet.parallel.ema import Ema
from trainfleet.parallel.engine import Engine, NativeEngine
from trainfleet.parallel.engines import make_engine
from trainfleet.parallel.experts import Experts, MixtureOfExperts, balance_loss
from trainfleet.parallel.spread import accumulating

__all__ = [
    "Ema",
    "Engine",
    "Experts",
    "MixtureOfExperts",
    "NativeEngine",
    "accumulating",
    "balance_loss",
    "make_engine",
    "parallelize",
]
