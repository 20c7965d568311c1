"""Activations: what blocks keep for backward rests in CPU memory until then (Rajbhandari et al., arXiv:1910.02054,
section 6.1), and comes back bit by bit.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from trainfleet.batch import arrays
from trainfleet.parallel.torch_private import in_backward, with_local, without_torch_functions

logger = logging.getLogger(__name__)

SMALLEST = 1 << 12
"""Bytes below which memory stays where it is: a copy of its own would cost more than it frees."""


def offload_activations(blocks: Sequence[nn.Module], device: str) -> None:
    """Let what each of `blocks` keeps for backward rest in CPU memory.

    On a GPU it leaves through pinned memory on a stream of its own while the next block computes, and the first use in
    backward of what one block kept begins the way back of what the block before kept. Two blocks at a time so lie on
    the device. Parameters, buffers, and inputs that need no gradient, such as masks, which blocks share, stay.
    """
    if torch.device(device).type == "cpu":
        logger.warning(
            "plan.activations is 'offload', but the model computes on the CPU: what blocks keep is copied within the "
            "same memory, which saves nothing. It is meant for GPUs."
        )
    journeys = _Journeys()
    for block in blocks:
        block.forward = _leaving(block, block.forward, journeys)  # type: ignore[method-assign]


@dataclass(eq=False)
class _Memory:
    """The memory of a storage, which several tensors may share, on its way out and back."""

    call: _Call
    device: torch.device
    source: torch.UntypedStorage | None
    """On the device; None once it has left."""
    versions: list[tuple[Tensor, int]] = field(default_factory=list)
    """Tensors in it, and how often each had been changed when it was kept."""
    host: Tensor | None = None
    back: Tensor | None = None
    ready: torch.cuda.Event | None = None
    """When `back` is filled."""
    is_changed: bool = False


@dataclass(frozen=True, slots=True)
class _View:
    """A tensor that was kept: where it lies in its memory."""

    memory: _Memory
    dtype: torch.dtype
    offset: int
    size: torch.Size
    stride: tuple[int, ...]
    like: DTensor | None

    def of(self, storage: torch.UntypedStorage) -> Tensor:
        local = torch.empty(0, dtype=self.dtype, device=storage.device)
        local.set_(storage, self.offset, self.size, self.stride)  # type: ignore[call-overload]
        return local if self.like is None else with_local(self.like, local)


class _Call:
    """What one call of a block keeps."""

    def __init__(self, before: _Call | None, stays: Iterable[Tensor], gathered: Callable[[], Iterable[Tensor]]) -> None:
        self.before = weakref.ref(before) if before is not None else lambda: None
        self.taken: dict[int, _Memory] = {}
        """By address, until the call ends; then autograd alone holds it."""
        self.left: list[weakref.ref[_Memory]] = []
        self.stays = addresses(stays)
        self.gathered = gathered
        """Parameters that appear only while the call runs."""
        self.gone: dict[torch.device, torch.cuda.Event] = {}
        """When all of it has left."""


class _Journeys:
    """Takes what blocks keep to CPU memory and back."""

    def __init__(self) -> None:
        self.last: _Call | None = None
        """The last call, whose memory may still be on its way out."""
        self.current: _Call | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    @contextmanager
    def call(self, stays: Iterable[Tensor], gathered: Callable[[], Iterable[Tensor]]) -> Iterator[None]:
        """Around one forward of a block."""
        self.current = call = _Call(self.last, stays, gathered)
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
                yield
        finally:
            self.current = None
        with torch.no_grad(), without_torch_functions():
            self._let_go()
            self._send(call)
        self.last = call

    @torch.no_grad()
    def _pack(self, tensor: Tensor) -> Any:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        call = self.current
        if call is None or not _is_plain(local):
            return tensor
        with without_torch_functions():
            storage = local.untyped_storage()
            address = storage.data_ptr()
            if storage.nbytes() < SMALLEST or address in call.stays or address in addresses(call.gathered()):
                return tensor
            memory = call.taken.setdefault(address, _Memory(call, local.device, storage))
            memory.versions.append((local, local._version))
            # Of a DTensor the placements alone.
            like = with_local(tensor, local.new_empty(0)) if isinstance(tensor, DTensor) else None
            return _View(memory, local.dtype, int(local.storage_offset()), local.size(), local.stride(), like)

    @torch.no_grad()
    def _unpack(self, kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        with without_torch_functions():
            memory: _Memory = kept.memory
            call = memory.call
            if self.last is not None and self.last is not call:
                self._let_go()
            if memory.source is not None:
                _note_changes(memory)
            else:
                self._fetch(call)
            if memory.is_changed:
                raise RuntimeError(
                    f"A tensor {list(kept.size)} that backward needs was changed in place after it was kept. Call the "
                    "form of the operation that returns a new tensor."
                )
            if (before := call.before()) is not None:
                self._fetch(before)  # beside the backward of this call
            if memory.source is not None:
                return kept.of(memory.source)  # type: ignore[no-any-return]
            assert memory.back is not None
            if memory.ready is not None:
                torch.cuda.current_stream(memory.back.device).wait_event(memory.ready)
            return kept.of(memory.back.untyped_storage())  # type: ignore[no-any-return]

    def _send(self, call: _Call) -> None:
        for memory in call.taken.values():
            assert memory.source is not None
            source = _bytes_of(memory.source)
            if not source.is_cuda:
                memory.host = source.to("cpu", copy=True)
                continue
            memory.host = torch.empty(source.shape, dtype=torch.uint8, pin_memory=True)
            stream = self._stream(source.device)
            if source.device not in call.gone:
                stream.wait_stream(torch.cuda.current_stream(source.device))
            with torch.cuda.stream(stream):
                memory.host.copy_(source, non_blocking=True)
            source.record_stream(stream)  # for what nobody keeps until `_let_go`
            call.gone[source.device] = stream.record_event()
        call.left = [weakref.ref(memory) for memory in call.taken.values()]
        call.taken = {}

    def _let_go(self) -> None:
        """Free on the device what the last call has sent off."""
        if self.last is None:
            return
        for device, event in self.last.gone.items():
            torch.cuda.current_stream(device).wait_event(event)  # so that at most two blocks are under way
        for memory in filter(None, (reference() for reference in self.last.left)):
            if memory.source is not None:
                _note_changes(memory)
                memory.source, memory.versions = None, []
        self.last.gone = {}

    def _fetch(self, call: _Call) -> None:
        for reference in call.left:
            memory = reference()
            if memory is None or memory.source is not None or memory.back is not None or memory.host is None:
                continue
            device = memory.device
            if device.type != "cuda":
                memory.back = memory.host
                continue
            memory.back = torch.empty(memory.host.shape, dtype=torch.uint8, device=device)
            stream = self._stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))  # the memory may have been somebody's until now
            with torch.cuda.stream(stream):
                memory.back.copy_(memory.host, non_blocking=True)
            memory.back.record_stream(stream)
            memory.ready = stream.record_event()

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return self._streams[device]


def _leaving(block: nn.Module, forward: Callable[..., Any], journeys: _Journeys) -> Callable[..., Any]:
    def gathered() -> Iterable[Tensor]:
        return block.parameters() if has_units else ()

    has_units = False

    @functools.wraps(forward)
    def leaving(*args: Any, **kwargs: Any) -> Any:
        nonlocal has_units
        if not torch.is_grad_enabled() or journeys.current is not None or in_backward():
            return forward(*args, **kwargs)
        has_units = any(isinstance(module, FSDPModule) and module is not block for module in block.modules())
        shared = (each for each in tensors_of(args, kwargs) if not each.requires_grad)
        with journeys.call([*block.parameters(), *block.buffers(), *shared], gathered):
            return forward(*args, **kwargs)

    return leaving


def tensors_of(args: Any, kwargs: Any) -> list[Tensor]:
    """Of the arguments of a call."""
    return [each for each in arrays((args, kwargs)) if isinstance(each, Tensor)]


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is its memory, its strides and its dtype, and no more."""
    is_itself = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    return is_itself and not (tensor.is_conj() or tensor.is_neg())


def _note_changes(memory: _Memory) -> None:
    memory.is_changed = memory.is_changed or any(tensor._version != was for tensor, was in memory.versions)


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # type: ignore[call-overload, no-any-return]


@torch.no_grad()
def addresses(tensors: Iterable[Tensor]) -> set[int]:
    """Of the memory that the tensors lie in."""
    found = set()
    for tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if _is_plain(local):
            found.add(local.untyped_storage().data_ptr())
    return found
