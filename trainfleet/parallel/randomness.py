"""Random numbers of the model: a pure function of (seed, step, micro-batch), so the same wherever it runs.

The micro-batch is counted over all ranks, in the order of the samples: rank r of R holds numbers r, R + r, 2R + r, …
One process that runs all of them draws the same dropout masks as R processes that share them.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from trainfleet.comm.group import Group
from trainfleet.state import PerRank

_MASK = (1 << 64) - 1


def number_in_step(i: int, parts: int, ranks: Group) -> int:
    """The number that this rank's `i`-th micro-batch has in the step of one process that takes those of all `ranks`.

    `parts` is plan.microbatches: so many follow each other that were cut from one.
    """
    return (i // parts * ranks.size + ranks.rank) * parts + i % parts


def seed_micro_batch(seed: int, step: int, micro_batch: int) -> None:
    """Set torch's generators (CPU and CUDA) for the forward and backward of one micro-batch."""
    own = mixed(mixed(mixed(seed) ^ step) ^ micro_batch) >> 1
    # Not torch.manual_seed: for each kind of device that is not in use it formats the stack (0.13 ms or more).
    torch.default_generator.manual_seed(own)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(own)


def mixed(value: int) -> int:
    """SplitMix64 (Steele et al., OOPSLA 2014): neighbours in, unrelated 64-bit numbers out."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def seed_generators(seed: int, rank: int) -> None:
    """Seed torch's generators alike on all ranks, for models are built from them; `random` and NumPy by rank."""
    torch.manual_seed(seed)
    own = mixed(mixed(seed) ^ rank)
    random.seed(own)
    np.random.seed(own & 0xFFFFFFFF)


class Generators:
    """Stateful: this rank's global random generators, of `random`, NumPy and torch, on the CPU and its GPU.

    The model's own random numbers need none of it; callbacks, losses and transforms of the user may.
    """

    def state_dict(self) -> dict[str, Any]:
        version, words, gauss = random.getstate()
        kind, keys, at, has_gauss, cached = np.random.get_state(legacy=True)  # type: ignore[misc]
        state = {
            "python": {"version": version, "words": np.array(words, np.uint32), "gauss": gauss},
            "numpy": {"kind": kind, "keys": keys, "at": at, "has_gauss": has_gauss, "cached": cached},
            "torch": torch.get_rng_state(),
        }
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            state["cuda"] = torch.cuda.get_rng_state()
        return {"own": PerRank(state)}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        own = state["own"].value
        python, numpy = own["python"], own["numpy"]
        words = tuple(int(word) for word in python["words"])
        random.setstate((python["version"], words, python["gauss"]))
        np.random.set_state(
            (numpy["kind"], numpy["keys"], int(numpy["at"]), int(numpy["has_gauss"]), float(numpy["cached"]))
        )
        torch.set_rng_state(own["torch"].cpu())
        if "cuda" in own and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.set_rng_state(own["cuda"].cpu())
