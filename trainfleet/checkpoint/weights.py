"""Weights alone, from wherever they are: a run, a checkpoint, or a file that others saved."""

from __future__ import annotations

from pathlib import Path

from trainfleet.checkpoint.arrays import num_bytes
from trainfleet.checkpoint.catalog import open_place
from trainfleet.checkpoint.checkpointer import Checkpointer
from trainfleet.checkpoint.foreign import ForeignArray, ForeignPiece, is_foreign, open_foreign
from trainfleet.checkpoint.foreign.hub import folder_of_hub, is_of_hub
from trainfleet.checkpoint.foreign.pieces import state_tree
from trainfleet.checkpoint.loading import Loading, refuse_misfits
from trainfleet.checkpoint.shard import Index, StoredPiece
from trainfleet.checkpoint.staging import state_of
from trainfleet.checkpoint.tree import join
from trainfleet.comm.group import Group
from trainfleet.errors import CheckpointError, StoreError, TrainfleetError
from trainfleet.state import Stateful

_REMEDY = (
    "If only names differ, import it under those of this model: trainfleet checkpoint import --strip-prefix, --only."
)


def load_weights(place: str, model: Stateful, *, group: Group | None = None, cast: bool = False) -> None:
    """Load the state `model` of what is at `place` into `model`; all ranks of `group` call it.

    A run folder, a folder of checkpoints, one step of it, a store's URL; what `open_foreign` reads: safetensors, a
    file of torch.save, a distributed checkpoint; or `hf:NAME` of the Hugging Face hub. CheckpointError, with `model`
    left as it was, if it is damaged or does not fit. `cast` takes floats of another dtype, rounded.
    """
    if is_of_hub(place):
        _load_foreign(folder_of_hub(place), model, group, cast)
        return
    if "://" not in place and is_foreign(Path(place).expanduser()):
        _load_foreign(Path(place).expanduser(), model, group, cast)
        return
    store, step = open_place(place)
    checkpointer = Checkpointer(store, group=group)
    if checkpointer.restore(step, partial=True, cast=cast, model=model) is None:
        raise CheckpointError(f"There is no checkpoint in {place}.")


def _load_foreign(place: Path, model: Stateful, group: Group | None, cast: bool) -> None:
    """Each rank reads what it wants of every array; only if all fared well is anything touched."""
    loading: Loading | None = None
    failure: TrainfleetError | None = None
    try:
        arrays = open_foreign(place).arrays
        loading = Loading([_index(arrays)], rank=0)
        loading.plan({"model": state_of("model", model)}, partial=True, cast=cast)
        refuse_misfits(loading.misfits.wrong, loading.misfits.surplus, str(place), hint=_REMEDY)
        for stored, foreign in _listed(arrays):
            if loading.wants(stored):
                loading.take(stored, foreign.read())
    except (CheckpointError, StoreError) as error:
        failure = error
    reasons = group.exchange(None if failure is None else str(failure)) if group else [None]
    if failure is not None:
        raise failure
    for rank, reason in enumerate(reasons):
        if reason is not None:
            raise CheckpointError(f"Nothing was loaded: on rank {rank}: {reason}")
    assert loading is not None
    loading.apply({"model": model})


def _listed(arrays: tuple[ForeignArray, ...]) -> list[tuple[StoredPiece, ForeignPiece]]:
    """The pieces, with what an index would say of them; there is no digest to hold them against."""
    return [
        (
            StoredPiece(
                path=join("model", array.name),
                dtype=array.dtype,
                region=piece.region,
                begin=0,
                end=num_bytes(array.dtype, piece.region.shape),
                digest="",
                per_rank=False,
            ),
            piece,
        )
        for array in arrays
        for piece in array.pieces
    ]


def _index(arrays: tuple[ForeignArray, ...]) -> Index:
    return Index(
        rank=0,
        data_name="",
        data_bytes=0,
        header_bytes=0,
        header_digest="",
        state=state_tree(arrays, "model"),
        pieces=(),
        left_to_rank_0=(),
    )
