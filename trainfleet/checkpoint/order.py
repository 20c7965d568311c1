"""One rank's part of one save, as an order to whoever writes it: a thread of the rank, or a process of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

from trainfleet.checkpoint.arrays import Bytes
from trainfleet.checkpoint.further import SaveFunction, further_files
from trainfleet.checkpoint.manifest import publish
from trainfleet.checkpoint.names import Attempt
from trainfleet.checkpoint.regions import Region
from trainfleet.checkpoint.retention import Retention
from trainfleet.checkpoint.settings import Export
from trainfleet.checkpoint.shard import write_shard
from trainfleet.checkpoint.staging import StagedPiece, StagedShard
from trainfleet.checkpoint.tidy import abandon, clear_leftovers, prune
from trainfleet.checkpoint.tree import Json
from trainfleet.errors import StoreError
from trainfleet.store import Store

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    attempt: Attempt
    rank: int
    staged: StagedShard
    metadata: Json
    """Encoded."""
    metrics: Mapping[str, float]
    retention: Retention
    timeout: timedelta
    """How long rank 0 waits for the shards of the others."""
    export: Export | None = None
    """Write the model as one safetensors file too."""
    distrusted: tuple[int, ...] = ()
    """Steps in which this run found damage; the retention does not count them."""

    def to_json(self, *, pieces: bool = True) -> Json:
        """Without `pieces` where they are those of the order before, and whoever reads it has them."""
        staged = self.staged
        return {
            "attempt": asdict(self.attempt),
            "rank": self.rank,
            "state": staged.state,
            "left_to_rank_0": staged.left_to_rank_0,
            "pieces": [
                [p.path, p.dtype, p.region.offsets, p.region.shape, p.start, int(p.data.size), p.per_rank]
                for p in staged.pieces
            ]
            if pieces
            else None,
            "metadata": self.metadata,
            "metrics": self.metrics,
            "retention": asdict(self.retention),
            "timeout": self.timeout.total_seconds(),
            "export": self.export,
            "distrusted": self.distrusted,
        }

    @classmethod
    def from_json(cls, body: Json, memory: Bytes, former: Order | None = None) -> Order:
        """The order that `to_json` gave; the bytes of its pieces lie in `memory`."""
        if body["pieces"] is None:
            assert former is not None
            pieces = former.staged.pieces
        else:
            pieces = tuple(_piece(memory, *piece) for piece in body["pieces"])
        return cls(
            attempt=Attempt(**body["attempt"]),
            rank=body["rank"],
            staged=StagedShard(state=body["state"], pieces=pieces, left_to_rank_0=tuple(body["left_to_rank_0"])),
            metadata=body["metadata"],
            metrics=body["metrics"],
            retention=Retention(**body["retention"]),
            timeout=timedelta(seconds=body["timeout"]),
            export=body["export"],
            distrusted=tuple(body["distrusted"]),
        )


def _piece(
    memory: Bytes, path: str, dtype: str, offsets: list[int], shape: list[int], start: int, size: int, per_rank: bool
) -> StagedPiece:
    return StagedPiece(
        path=path,
        dtype=dtype,
        region=Region(tuple(offsets), tuple(shape)),
        data=memory[start : start + size],
        start=start,
        per_rank=per_rank,
    )


def carry_out(store: Store, order: Order, save_function: SaveFunction | None = None) -> None:
    """Write the shard; on rank 0 wait for the others, publish and tidy. What fails leaves nothing that counts."""
    attempt, rank = order.attempt, order.rank

    def add_files(indexes: list[Any]) -> list[Any]:
        return further_files(store, attempt, indexes, order.export, save_function)

    try:
        if rank == 0:
            _tolerate(lambda: clear_leftovers(store, attempt), "clear what unfinished saves left")
        write_shard(store, attempt, rank, order.staged)
        if rank == 0:
            publish(store, attempt, order.metadata, order.timeout, metrics=order.metrics, add_files=add_files)
    except Exception as error:
        abandon(store, attempt, rank, str(error))
        raise
    if rank == 0:
        _tolerate(lambda: prune(store, order.retention, order.distrusted), "remove old checkpoints")
        _tolerate(lambda: clear_leftovers(store, attempt), "clear what replaced saves left")


def _tolerate(tidy: Callable[[], object], what: str) -> None:
    """Tidying that fails is told, and spoils nothing."""
    try:
        tidy()
    except StoreError as error:
        logger.warning("Could not %s: %s", what, error)
