"""Taken: which samples a micro-batch holds, found from its place in the order; nothing of it travels with batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainfleet.data.sampler import Share


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One slot of a micro-batch."""

    epoch: int | None
    """None where the source does not say: what is only iterated counts through its epochs."""
    position: int
    """In the order of the epoch, of all ranks; of what is only iterated, since the stream began."""
    index: int | None
    """In the source; None for what has no index, or lies with feeders."""
    shard: int | None = None
    """Of a source that is iterated in shards."""
    row: int | None = None
    """In that shard, since the stream began."""
    counts: bool = True
    """False for one that only fills a slot, at weight 0."""
    is_left_out: bool = False
    """True where the sample was bad, and another stands in its slot at weight 0."""

    def __str__(self) -> str:
        if self.shard is not None:
            return f"row {self.row} of shard {self.shard}"
        where = f"position {self.position}" + (f" of epoch {self.epoch}" if self.epoch is not None else "")
        text = where if self.index is None else f"sample {self.index} ({where})"
        if self.is_left_out:
            return f"the stand-in for {text}"
        return text if self.counts else f"{text}, of weight 0"


def of_share(
    share: Share,
    *,
    epoch: int | None,
    indices: Sequence[int] | None,
    shards: int | None = None,
    skipped: Sequence[int] = (),
) -> tuple[Sample, ...]:
    """The samples of a rank's share of a span; `skipped` are indices of bad ones."""
    return tuple(
        Sample(
            epoch=epoch,
            position=int(position),
            index=None if indices is None else int(indices[slot]),
            shard=None if shards is None else int(position) % shards,
            row=None if shards is None else int(position) // shards,
            counts=bool(share.weights[slot]),
            is_left_out=indices is not None and int(indices[slot]) in skipped,
        )
        for slot, position in enumerate(share.positions)
    )
