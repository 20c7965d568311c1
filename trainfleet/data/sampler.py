"""Who takes which positions of the order: the cut into global micro-batches, and a rank's share of each.

An epoch of n positions is cut into spans of `step` = world_size * size positions, in order; rank r takes
the r-th `size` of each. What all ranks take together is contiguous, so the stream of samples does not
depend on how many they are, and one integer, the position, says what is left of an epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from trainfleet.data.order import Indices, indices_at
from trainfleet.data.source import blocks_of
from trainfleet.errors import DataError

Short: TypeAlias = Literal["drop", "pad", "keep"]


@dataclass(frozen=True, slots=True)
class Span:
    """The positions `begin` to `end` of an epoch that all ranks together take in one micro-batch."""

    epoch: int
    begin: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Share:
    """One rank's part of a span."""

    positions: Indices
    weights: NDArray[np.float32]  # 1 for a sample of this rank, 0 for one repeated to fill a slot
    weighted: bool  # a fact about the span: true on every rank as soon as one of them may hold a 0


def next_span(epoch: int, position: int, *, num_samples: int, step: int, short: Short) -> tuple[Span, int]:
    """What comes next after `position`, and how many samples were dropped on the way there."""
    left = num_samples - position
    if left >= step:
        return Span(epoch, position, position + step), 0
    if left > 0 and short != "drop":
        return Span(epoch, position, num_samples), 0
    return Span(epoch + 1, 0, min(step, num_samples)), left


def share_of(span: Span, *, rank: int, world_size: int, size: int, short: Short) -> Share:
    """The positions rank `rank` takes of `span`: never none, and together exactly the span.

    A short span is divided as the rule says. `pad`: every rank has `size` slots, and those past the end
    repeat samples from the epoch's start with weight 0. `keep`: the rest is split evenly; where it is
    fewer samples than ranks, a rank without one repeats the first with weight 0.
    """
    if span.size == size * world_size:
        begin = span.begin + rank * size
        return Share(np.arange(begin, begin + size), np.ones(size, np.float32), short == "pad")
    if short == "pad":
        slots = span.begin + rank * size + np.arange(size)
        return Share(slots % span.end, (slots < span.end).astype(np.float32), True)
    each, more = divmod(span.size, world_size)
    begin, end = (span.begin + r * each + min(r, more) for r in (rank, rank + 1))
    weighted = span.size < world_size
    if begin == end:
        return Share(np.array([span.begin]), np.zeros(1, np.float32), weighted)
    return Share(np.arange(begin, end), np.ones(end - begin, np.float32), weighted)


def check_places(num_samples: int, *, size: int, rank: int, world_size: int, short: Short, name: str) -> None:
    """Refuse what could not give every rank the same number of micro-batches."""
    if size < 1:
        raise DataError(f"The micro-batch size is {size}; it must be at least 1.")
    if not 0 <= rank < world_size:
        raise DataError(f"Rank {rank} does not exist among {world_size} ranks.")
    if short not in ("drop", "pad", "keep"):
        raise DataError(f"short is {short!r}; use 'drop', 'pad' or 'keep'.")
    if num_samples < 1:
        raise DataError(f"{name} is empty: there is nothing to train on. Check its path and its filters.")
    step = size * world_size
    if short == "drop" and num_samples < step:
        raise DataError(
            f"{name} has {num_samples} samples, fewer than one micro-batch of all ranks "
            f"({world_size} x {size} = {step}), and short='drop' would drop them all. "
            "Use a smaller micro-batch, fewer ranks, or short='pad'."
        )
    if short == "keep" and num_samples < world_size:
        raise DataError(
            f"{name} has {num_samples} samples for {world_size} ranks, so some would hold none. "
            "Use fewer ranks, or short='pad'."
        )


class Sampler:
    """The indices of one rank, for any `torch.utils.data.DataLoader(source, batch_size=size, sampler=...)`.

    Each pass over it is what is left of an epoch; the next pass is the next epoch, without `set_epoch`.
    A loader with workers runs ahead of the loop, so tell `state_dict(batches=k)` how many batches of this
    pass were used. There is no room for weights here: `short="pad"` repeats samples as they are.
    """

    def __init__(
        self,
        source: Sized | int,
        *,
        size: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        short: Short = "drop",
        epoch: int = 0,
        position: int = 0,
    ) -> None:
        self.num_samples = source if isinstance(source, int) else len(source)
        self.blocks = blocks_of(source)
        check_places(self.num_samples, size=size, rank=rank, world_size=world_size, short=short, name="The dataset")
        self.size, self.rank, self.world_size = size, rank, world_size
        self.seed, self.shuffle, self.short = seed, shuffle, short
        self._place = self._pass_began = (epoch, position)

    def __iter__(self) -> Iterator[int]:
        span, _ = self._next(*self._place)
        self._pass_began = (span.epoch, span.begin)
        epoch = span.epoch
        while span.epoch == epoch:
            share = share_of(span, rank=self.rank, world_size=self.world_size, size=self.size, short=self.short)
            indices = indices_at(
                share.positions,
                num_samples=self.num_samples,
                seed=self.seed,
                epoch=epoch,
                shuffle=self.shuffle,
                blocks=self.blocks,
            ).tolist()
            yield from indices[:-1]
            self._place = (epoch, span.end)  # before the last one: a loader need not ask beyond it
            yield indices[-1]
            span, _ = self._next(epoch, span.end)
        self._place = (epoch + 1, 0)

    def __len__(self) -> int:
        """Indices in the next pass."""
        span, _ = self._next(*self._place)
        epoch, count = span.epoch, 0
        full, rest = divmod(self.num_samples - span.begin, self.size * self.world_size)
        count = full * self.size
        if rest and self.short != "drop":
            last = Span(epoch, self.num_samples - rest, self.num_samples)
            share = share_of(last, rank=self.rank, world_size=self.world_size, size=self.size, short=self.short)
            count += len(share.positions)
        return count

    def state_dict(self, *, batches: int | None = None) -> dict[str, Any]:
        """Where to go on after `batches` batches of the current pass, or after all indices handed out."""
        epoch, position = self._place
        if batches is not None:
            epoch, position = self._pass_began
            position = min(position + batches * self.size * self.world_size, self.num_samples)
        return {"epoch": epoch, "position": position, "seed": self.seed, "samples": self.num_samples}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        check_same_source(state, self.num_samples)
        self.seed = int(state["seed"])
        self._place = self._pass_began = (int(state["epoch"]), int(state["position"]))

    def _next(self, epoch: int, position: int) -> tuple[Span, int]:
        step = self.size * self.world_size
        return next_span(epoch, position, num_samples=self.num_samples, step=step, short=self.short)


def check_same_source(state: Mapping[str, Any], num_samples: int) -> None:
    if int(state["samples"]) != num_samples:
        raise DataError(
            f"The saved position {state['position']} of epoch {state['epoch']} belongs to a dataset of "
            f"{state['samples']} samples, but this one has {num_samples}. Resume with the same data, or start anew."
        )
