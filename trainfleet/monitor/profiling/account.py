"""An account of memory: who held what before some steps and in them, joined with what allocators did."""

from __future__ import annotations

import functools
import gc
import time
import weakref
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from trainfleet.monitor.profiling.allocations import PHASE, Block, Followed
from trainfleet.monitor.profiling.growth import growth_of
from trainfleet.monitor.profiling.holders import Held, all_held, held_by, storages_of
from trainfleet.monitor.profiling.holdings import Look, end_unseen, holdings
from trainfleet.monitor.profiling.memory_report import MemoryReport, report_of
from trainfleet.monitor.profiling.module_ranges import ModuleRanges
from trainfleet.stopwatch import marked

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


class Account:
    """From `open` to `close` it looks where gradients are whole and after each update, and names phases and modules."""

    def __init__(
        self, model: nn.Module | None = None, optimizer: Optimizer | None = None, *, step: int = 0, rank: int = 0
    ) -> None:
        """`step` is the number of steps taken so far."""
        self._model, self._optimizer = model, optimizer
        self._step, self._rank = step, rank
        self._closing = ExitStack()
        self._before: list[Block] = []
        self._watched: list[tuple[weakref.ref[Any], Block]] = []
        self._looks: list[Look] = []
        self._begin = 0
        self._ends: list[int] = []

    @property
    def num_steps(self) -> int:
        """Ended so far."""
        return len(self._ends)

    def begin(self, batch: Any = None) -> None:
        """See who holds what; steps are counted from here. `batch` is there already."""
        gc.collect()
        self._before, self._watched, held = [], [], {}
        for each, storage in all_held(self._model, self._optimizer, batch):
            held[each.device, each.address] = each
            block = Block(each.device, each.address, each.size_bytes, 0, shape=each.shape)
            self._before.append(block)
            self._watched.append((weakref.ref(storage, functools.partial(_free, block)), block))
        self._looks = [Look(time.time_ns(), held)]
        self._before += _unknown(self._before)
        self._ends = []
        self._begin = time.time_ns()

    def open(self) -> None:
        """Name phases and modules for a profiler, and look where an optimizer steps."""
        from torch.autograd.profiler import record_function
        from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

        self._closing.enter_context(marked(lambda phase: record_function(PHASE + phase)))
        if self._model is not None:
            self._closing.enter_context(ModuleRanges(self._model))
        # Gradients are whole before an update, and its state is there after it.
        for register in (register_optimizer_step_pre_hook, register_optimizer_step_post_hook):
            self._closing.callback(register(lambda *_: self.look()).remove)

    def look(self) -> None:
        """See who holds what now."""
        self._note(held_by(self._model, self._optimizer))

    def end_step(self) -> None:
        """The step under way has ended."""
        self._step += 1
        self._note(all_held(self._model, self._optimizer))
        self._ends.append(time.time_ns())

    def close(self) -> None:
        """Leave nothing behind that would slow others."""
        self._closing.close()

    def report(self, followed: Followed, *, whole: bool = False) -> MemoryReport:
        """The last step, or all of them where `whole`; what grows over all of them."""
        ends = self._ends or [time.time_ns()]
        end_unseen(followed, self._looks)
        made = {(block.device, block.address): block.made for block in reversed(followed.blocks)}
        for block in self._before:
            again = made.get((block.device, block.address))
            if block.freed is None and again is not None:
                block.freed = again  # something else lies there, so it is gone
        found = holdings(followed, self._before, self._looks, end=ends[-1])
        device = self._device()
        begin = self._begin if whole or len(ends) == 1 else ends[-2]
        counts = [c for c in followed.counted if c.device == device and begin <= c.at <= ends[-1]]
        return report_of(
            found,
            followed.phases,
            begin=begin,
            end=ends[-1],
            device=device,
            step=self._step,
            rank=self._rank,
            growth=growth_of(found, ends, device),
            reserved_bytes=max((count.reserved_bytes for count in counts), default=0),
            allocator_peak_bytes=max((count.allocated_bytes for count in counts), default=None),
        )

    def _note(self, found: list[tuple[Held, Any]]) -> None:
        now = time.time_ns()
        self._looks.append(Look(now, {(each.device, each.address): each for each, _ in found}))
        for reference, block in self._watched:
            storage = reference()
            if block.freed is None and storage is not None and storage.data_ptr() != block.address:
                block.freed = now  # its memory was given back or exchanged, as FSDP2 does

    def _device(self) -> str:
        """The device of most parameters; without a model the one where most is held."""
        sizes: dict[str, int] = {}
        for parameter in self._model.parameters() if self._model is not None else ():
            for storage, _ in storages_of(parameter):
                sizes[str(storage.device)] = sizes.get(str(storage.device), 0) + storage.nbytes()
        if not sizes:
            for block in self._before:
                sizes[block.device] = sizes.get(block.device, 0) + block.size_bytes
        return max(sizes, key=lambda name: sizes[name], default="cpu")


def _free(block: Block, reference: weakref.ref[Any]) -> None:
    if block.freed is None:
        block.freed = time.time_ns()


def _unknown(known: list[Block]) -> list[Block]:
    """What the allocators of GPUs gave out beside the blocks that are known."""
    import torch

    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return []
    found = []
    for i in range(torch.cuda.device_count()):
        name = f"cuda:{i}"
        missing = torch.cuda.memory_allocated(i) - sum(block.size_bytes for block in known if block.device == name)
        if missing > 0:
            found.append(Block(name, 0, missing, 0))
    return found
