"""The ways to save that are compared: ours, those of torch, and a plain write of as many bytes."""

from __future__ import annotations

import ctypes
import os
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.tensor import DTensor

from trainfleet.checkpoint import Checkpointer, Retention
from trainfleet.store import FileStore

RAW, SYNC, THREAD, PROCESS, OURS = "plain write", "DCP sync", "DCP async, thread", "DCP async, process", "trainfleet"

Wait: TypeAlias = Callable[[], object]
"""Returns when what was begun is committed."""


class Saver:
    """One way to save. `begin(number)` returns when the loop may go on, with what waits for the commit."""

    def __init__(
        self,
        begin: Callable[[Path, int], Wait],
        folder: Path,
        close: Callable[[], object] = lambda: None,
        load: Callable[[Path, int], object] | None = None,
    ) -> None:
        self._begin = begin
        self._folder = folder
        self._number = 0
        self.close = close
        self.restore = partial(self._load_last, load) if load else None

    def begin(self) -> Wait:
        self._number += 1
        return self._begin(self._place, self._number)

    def _load_last(self, load: Callable[[Path, int], object]) -> None:
        load(self._place, self._number)

    @property
    def _place(self) -> Path:
        return self._folder / f"step-{self._number:08d}"

    def tidy(self, mesh: Any) -> None:
        """Outside of what is timed: what was saved is removed, and nothing is left to be written."""
        mesh.data_axes.barrier()
        if mesh.is_main:
            shutil.rmtree(self._place)
            os.sync()
        mesh.data_axes.barrier()


def makers_for(loop: Any, mesh: Any, folder: Path, *, rivals: bool) -> dict[str, Callable[[], Saver]]:
    found = {
        OURS: partial(ours, loop, mesh, folder / "ours"),
        RAW: partial(plain_write, bytes_of(loop), mesh, folder / "raw"),
    }
    if rivals:
        found[SYNC] = partial(dcp_sync, loop, folder / "sync")
        found[THREAD] = partial(dcp_async, loop, folder / "thread", "thread")
        found[PROCESS] = partial(dcp_async, loop, folder / "process", "process")
    return found


def ours(loop: Any, mesh: Any, folder: Path) -> Saver:
    # What was saved is removed by `tidy`, as for the others.
    checkpointer = Checkpointer(FileStore(folder), retention=Retention(last=9), group=mesh.data_axes)
    checkpointer.prepare(**loop.engine.state())
    return Saver(
        lambda place, number: checkpointer.save(number, **loop.engine.state()).wait,
        folder,
        checkpointer.close,
        lambda place, number: checkpointer.restore(number, **loop.engine.state()),
    )


def plain_write(num_bytes: int, mesh: Any, folder: Path) -> Saver:
    data = memoryview(random.Random(mesh.rank).randbytes(num_bytes))

    def begin(place: Path, number: int) -> Wait:
        place.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(place / str(mesh.rank), os.O_WRONLY | os.O_CREAT)
        rest = data
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
        os.close(descriptor)
        return lambda: None

    return Saver(begin, folder)


def dcp_sync(loop: Any, folder: Path) -> Saver:
    def begin(place: Path, number: int) -> Wait:
        dcp.save(state_for_dcp(loop), checkpoint_id=place)
        return lambda: None

    def load(place: Path, number: int) -> None:
        state = state_for_dcp(loop)
        dcp.load(state, checkpoint_id=place)
        set_state_dict(loop.model, loop.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])

    return Saver(begin, folder, load=load)


def dcp_async(loop: Any, folder: Path, kind: str) -> Saver:
    stager = DefaultStager(
        StagingOptions(
            use_pinned_memory=False,
            use_shared_memory=kind == "process",
            use_async_staging=False,
            use_non_blocking_copy=False,
        )
    )
    # Its thread must not mix its collectives with those of the loop.
    group = dist.new_group(backend="gloo") if kind == "thread" else None

    def begin(place: Path, number: int) -> Wait:
        done = dcp.async_save(
            state_for_dcp(loop),
            checkpoint_id=place,
            process_group=group,
            async_checkpointer_type=AsyncCheckpointerType(kind),
            async_stager=stager,
        )
        return done.result

    return Saver(begin, folder, stager.close)


def state_for_dcp(loop: Any) -> dict[str, Any]:
    model, optimizer = get_state_dict(loop.model, loop.optimizer)
    return {"model": model, "optimizer": optimizer}


def tensors_of(loop: Any) -> list[Tensor]:
    """What this rank has to store."""
    tensors = [*loop.model.parameters(), *(v for memory in loop.optimizer.state.values() for v in memory.values())]
    return [(tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach() for tensor in tensors]


def bytes_of(loop: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(loop))


def copier(tensors: list[Tensor]) -> Callable[[], None]:
    """Copies them into memory that it has already: the least that any of these can be blocked for."""
    copies = [tensor.clone() for tensor in tensors]

    def copy() -> None:
        for mine, theirs in zip(copies, tensors):
            ctypes.memmove(mine.data_ptr(), theirs.data_ptr(), mine.nbytes)

    return copy
