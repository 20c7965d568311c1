"""Budget: which blocks are recomputed, so that what the others keep for backward fits into a part of the memory.

Every block is recomputed in the first step, which measures what each would keep and how long it takes. Then those stay
as they are that are dear to compute again for the bytes that they keep: a knapsack (Chen et al., arXiv:1604.06174,
leave the choice open; Jain et al., arXiv:1910.02653, take the best one).
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from trainfleet.comm.group import Group
from trainfleet.parallel.layout import piece_of
from trainfleet.parallel.torch_private import innermost_saving_hooks

logger = logging.getLogger(__name__)

_UNITS = 1000
"""Parts into which the knapsack cuts the room that there is."""


@dataclass(kw_only=True)
class Cost:
    """What a recomputed block would keep, and what it takes to compute it again."""

    block: nn.Module = field(repr=False)
    kept_bytes: int = 0
    """Kept for backward by one call that is not recomputed, without parameters and buffers."""
    input_bytes: int = 0
    """Kept by one call that is."""
    seconds: float = 0.0
    """The fastest forward."""
    calls: int = 0
    is_kept: bool = False
    """Whether the block is left as it is, and not recomputed."""

    @contextmanager
    def measuring(self, inputs: Sequence[Tensor]) -> Iterator[None]:
        """Around the block's forward, inside what recomputes it."""
        held = {_storage(each) for each in (*self.block.parameters(), *self.block.buffers())}
        seen: dict[StorageWeakRef, int] = {}
        pack_outside, unpack_outside = innermost_saving_hooks()

        def pack(tensor: Tensor) -> object:
            if (storage := _storage(tensor)) not in held:
                seen[storage] = piece_of(tensor).untyped_storage().nbytes()
            return pack_outside(tensor)

        self.calls += 1
        with self.timing(), torch.autograd.graph.saved_tensors_hooks(pack, unpack_outside):
            yield
        own = {_storage(each): piece_of(each).untyped_storage().nbytes() for each in inputs}
        self.kept_bytes = max(self.kept_bytes, sum(seen.values()))
        self.input_bytes = max(self.input_bytes, sum(own.values()))

    @contextmanager
    def timing(self) -> Iterator[None]:
        """Around the forward again, in backward."""
        begun = _now(self.block)
        try:
            yield
        finally:  # also where torch cuts it short, because all that was wanted has been computed
            passed = _now(self.block) - begun
            self.seconds = min(self.seconds, passed) if self.seconds else passed


class Budget:
    """Measures the recomputed blocks of a model in the first step, and chooses among them when `settle` is called."""

    def __init__(self, model: nn.Module, part: float) -> None:
        self.part = part
        self.is_settled = False
        self._names = {module: name for name, module in model.named_modules()}
        self._costs: dict[str, Cost] = {}

    def cost_of(self, block: nn.Module) -> Cost:
        """The cost of a block of the model, to be filled as it runs."""
        return self._costs.setdefault(self._names[block], Cost(block=block))

    def settle(self, group: Group) -> None:
        """Choose which blocks are recomputed from now on: a collective over `group`, between two steps.

        All ranks that hold the same blocks choose the same, by the largest of their measures. A second call does
        nothing. Blocks that have not run stay recomputed.
        """
        if self.is_settled:
            return
        self.is_settled = True
        mine = {
            name: [cost.kept_bytes, cost.input_bytes, cost.seconds, cost.calls]
            for name, cost in self._costs.items()
            if cost.calls
        }
        theirs = [each for each in group.exchange(mine) if isinstance(each, Mapping)]
        measured: dict[str, list[float]] = {}
        for name in self._costs:
            if found := [each[name] for each in theirs if name in each]:
                measured[name] = [max(column) for column in zip(*found)]
        names = list(measured)
        chosen = choose(
            [(kept * calls, own * calls, seconds * calls) for kept, own, seconds, calls in measured.values()], self.part
        )
        for i in chosen:
            self._costs[names[i]].is_kept = True
        logger.info("%s", self._described(measured))

    def _described(self, measured: Mapping[str, Sequence[float]]) -> str:
        total = sum(kept for kept, *_ in measured.values())
        left = sum(kept if self._costs[name].is_kept else own for name, (kept, own, *_) in measured.items())
        again = sum(not self._costs[name].is_kept for name in measured)
        return (
            f"plan.recompute_budget: {again} of {len(measured)} blocks are recomputed. Of {total / 2**20:.1f} MiB that "
            f"one call of each would keep, {left / 2**20:.1f} are kept ({100 * left / (total or 1):.0f} %)."
        )


def choose(costs: Sequence[tuple[float, float, float]], part: float) -> list[int]:
    """Which of the blocks with (bytes kept as they are, bytes kept where recomputed, seconds) are not recomputed.

    Those whose seconds are the most in sum, where all that is kept then is at most `part` of what would be kept without
    recomputing. Exact to a thousandth of the room. Of blocks that are alike the later ones are left: backward frees
    them before it recomputes the others.
    """
    extra = [max(0.0, kept - own) for kept, own, _ in costs]
    room = part * sum(kept for kept, *_ in costs) - sum(min(kept, own) for kept, own, _ in costs)
    if sum(extra) <= room * (1 + 1e-9):
        return list(range(len(costs)))
    unit = max(room, 1e-9) / _UNITS
    weights = [_rounded_up(each / unit) if room > 0 or not each else _UNITS + 1 for each in extra]
    values = _in_tenths([seconds for *_, seconds in costs])
    best = [[0] * (_UNITS + 1)]  # best[i][w]: the most tenths that the first i blocks spare within w units
    for weight, value in zip(weights, values):
        last = best[-1]
        best.append([max(last[w], last[w - weight] + value if w >= weight else 0) for w in range(_UNITS + 1)])
    chosen, left = [], _UNITS
    for i in range(len(costs) - 1, -1, -1):
        if weights[i] <= left and best[i + 1][left] == best[i][left - weights[i]] + values[i]:
            chosen.append(i)
            left -= weights[i]
    return chosen[::-1]


def _rounded_up(number: float) -> int:
    return min(_UNITS + 1, int(-(-(number - 1e-6) // 1)))


def _in_tenths(seconds: Sequence[float]) -> list[int]:
    """Of the mean: what is measured of equal blocks differs by less."""
    mean = sum(seconds) / len(seconds) if seconds else 0.0
    return [max(1, round(10 * each / mean)) if mean else 1 for each in seconds]


def _storage(tensor: Tensor) -> StorageWeakRef:
    """Tells memory apart also after it was freed and its address taken by other memory."""
    return StorageWeakRef(piece_of(tensor).untyped_storage())  # type: ignore[no-untyped-call]


@functools.lru_cache(maxsize=1)
def _has_accelerator() -> bool:
    return torch.cuda.is_available()


def _now(block: nn.Module) -> float:
    if _has_accelerator() and any(parameter.is_cuda for parameter in block.parameters()):
        torch.cuda.synchronize()
    return time.perf_counter()
