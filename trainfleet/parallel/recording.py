"""A recording: the tensor operations of a constructor in their order, to be run later with little memory.

A tensor is written down as a view of a numbered storage, so aliases, transposes and `.data` need no
operations of their own. Running goes forwards once; before that one pass backwards finds what is still
needed. An operation that overwrites a whole storage ends the life of what was there; a random one always
runs, because the numbers after it depend on it, and its result is dropped where nobody reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from trainfleet.errors import PlanError

aten = torch.ops.aten
Storage: TypeAlias = int  # the number of a storage within its recording
Receive: TypeAlias = Callable[[Storage, torch.UntypedStorage], None]

FILLS = {
    *(aten.normal_.default, aten.uniform_.default, aten.exponential_.default, aten.log_normal_.default),
    *(aten.cauchy_.default, aten.geometric_.default, aten.random_.default, aten.random_.to),
    *(getattr(aten.random_, "from"), aten.bernoulli_.float, aten.zero_.default, aten.fill_.Scalar),
}
"""Operations that write all of their first argument and look at no tensor."""
OVERWRITES = FILLS | {aten.copy_.default, aten.fill_.Tensor}
"""Operations that write all of their first argument without looking at what was there."""
EMPTIES = {
    *(aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default),
    *(aten.new_empty.default, aten.new_empty_strided.default),
}


@dataclass(frozen=True, slots=True)
class View:
    """Where a tensor lies in a storage."""

    storage: Storage
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    is_conj: bool = False
    is_neg: bool = False

    @classmethod
    def of(cls, tensor: Tensor, storage: Storage) -> View:
        size, stride, offset = tuple(tensor.size()), tuple(tensor.stride()), int(tensor.storage_offset())
        return cls(storage, tensor.dtype, size, stride, offset, tensor.is_conj(), tensor.is_neg())

    def on(self, memory: torch.UntypedStorage) -> Tensor:
        """The tensor itself, in `memory`."""
        tensor = torch.empty(0, dtype=self.dtype, device=memory.device)
        tensor.set_(memory, self.offset, self.size, self.stride)  # type: ignore[call-overload]
        tensor = torch._neg_view(tensor) if self.is_neg else tensor
        return torch.conj(tensor) if self.is_conj else tensor

    def covers(self, num_bytes: int) -> bool:
        """Whether it is every byte of a storage of `num_bytes`, each once."""
        expected = 1
        for stride, size in sorted(zip(self.stride, self.size)):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return self.offset == 0 and expected * self.dtype.itemsize == num_bytes


@dataclass(frozen=True, slots=True)
class Constant:
    """A tensor with values that an operation reads."""

    tensor: Tensor
    version: int
    where: str

    @classmethod
    def of(cls, tensor: Tensor, where: str) -> Constant:
        return cls(tensor, tensor._version, where)

    def value(self) -> Tensor:
        if self.tensor._version != self.version:
            raise PlanError(
                f"A tensor that {self.where} read while its model was deferred has been changed since, so the "
                "parameters made of it would differ. Materialise the model first, or give it a copy."
            )
        return self.tensor.detach().cpu()


@dataclass(slots=True)
class Op:
    """One operation: what to run, what it reads, what it makes."""

    run: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    made: tuple[View | None, ...] = ()
    """The flattened results; a view for each tensor in a storage of its own."""
    reads: frozenset[Storage] = frozenset()
    writes: frozenset[Storage] = frozenset()
    overwrites: frozenset[Storage] = frozenset()
    """Those of `writes` of which nothing remains."""
    is_random: bool = False
    default_dtype: torch.dtype = torch.float32

    @property
    def new(self) -> frozenset[Storage]:
        return frozenset(view.storage for view in self.made if view is not None)

    @property
    def touched(self) -> frozenset[Storage]:
        return self.reads | self.writes | self.new


@dataclass(slots=True)
class Rewind:
    """The constructor put a generator somewhere else: to `state`, or to where it was after operation `after`."""

    generator: torch.Generator
    state: Tensor | None = None
    after: int | None = None


@dataclass
class Recording:
    """What a constructor did, and where its random numbers began."""

    steps: list[Op | Rewind] = field(default_factory=list)
    num_bytes: list[int] = field(default_factory=list)
    """Of each storage."""
    starts: dict[torch.Generator, Tensor] = field(default_factory=dict)
    """The state of each generator before its first use."""

    def slice_of(self, wanted: Iterable[Storage]) -> list[Op]:
        """The operations that the present contents of `wanted` come from, in order."""
        live, found = set(wanted), []
        for step in reversed(self.steps):
            if isinstance(step, Op) and (step.writes | step.new) & live:
                found.append(step)
                live = (live - step.overwrites - step.new) | step.reads
        return found[::-1]

    def run(self, wanted: Iterable[Storage], receive: Receive, *, replacing: tuple[Tensor, Tensor]) -> None:
        """Run everything; `receive` gets each wanted storage after its last write.

        Generators begin where they were; one that began at the first state of `replacing` begins at the second.
        """
        for generator, state in self.starts.items():
            generator.set_state(replacing[1] if torch.equal(state, replacing[0]) else state)
        run_steps(self.steps, self.num_bytes, wanted, receive)

    def __deepcopy__(self, memo: object) -> Recording:
        return self  # written once, then only read; generators cannot be copied


def run_steps(
    steps: Sequence[Op | Rewind],
    num_bytes: Sequence[int],
    wanted: Iterable[Storage],
    receive: Receive,
) -> None:
    """Run what is needed for `wanted`, holding each storage from its first needed write to its last needed use."""
    needed, finished, freed = _lives(steps, set(wanted))
    remembered: dict[int, Tensor | None] = {step.after: None for step in steps if _returns(step)}  # type: ignore
    held: dict[Storage, torch.UntypedStorage] = {}
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for i, step in enumerate(steps):
            if isinstance(step, Rewind):
                state = step.state if step.after is None else remembered[step.after]
                assert state is not None
                step.generator.set_state(state)
            elif needed[i]:
                _run(step, held, num_bytes)
                for storage in finished.get(i, ()):
                    receive(storage, held[storage])
                for storage in freed[i]:
                    held.pop(storage, None)
                if i in remembered:
                    remembered[i] = (step.kwargs.get("generator") or torch.default_generator).get_state()


def _returns(step: Op | Rewind) -> bool:
    return isinstance(step, Rewind) and step.after is not None


def _lives(
    steps: Sequence[Op | Rewind], wanted: set[Storage]
) -> tuple[list[bool], dict[int, frozenset[Storage]], list[set[Storage]]]:
    """Which steps are needed; which wanted storages are finished after a step; which are free after it."""
    live, unfinished = set(wanted), set(wanted)
    needed = [False] * len(steps)
    finished: dict[int, frozenset[Storage]] = {}
    freed: list[set[Storage]] = [set() for _ in steps]
    for i in range(len(steps) - 1, -1, -1):
        step = steps[i]
        if isinstance(step, Rewind) or not (step.is_random or (step.writes | step.new) & live):
            continue
        needed[i] = True
        finished[i] = step.touched & unfinished
        unfinished -= finished[i]
        freed[i] = (set(step.touched) - live) | finished[i]
        live = (live - step.overwrites - step.new) | step.reads
    assert not unfinished, "a wanted storage that no operation makes"
    return needed, finished, freed


def _run(op: Op, held: dict[Storage, torch.UntypedStorage], num_bytes: Sequence[int]) -> None:
    def real(leaf: Any) -> Any:
        if isinstance(leaf, Constant):
            return leaf.value()
        if not isinstance(leaf, View):
            return leaf
        if leaf.storage not in held:
            held[leaf.storage] = _memory(num_bytes[leaf.storage])
        return leaf.on(held[leaf.storage])

    args, kwargs = pytree.tree_map(real, (op.args, op.kwargs))
    with _default_dtype(op.default_dtype):
        results = pytree.tree_leaves(op.run(*args, **kwargs))
    for result, view in zip(results, op.made, strict=True) if op.made else ():
        if view is None:
            continue
        if op.run in EMPTIES:
            result.zero_()  # what the constructor never wrote is the same on every rank
        held[view.storage] = _laid_out(result, view, num_bytes[view.storage])


def _laid_out(result: Tensor, view: View, num_bytes: int) -> torch.UntypedStorage:
    """The storage of `result`, which must lie as `view` says: kernels may lay out what meta does otherwise."""
    memory = result.untyped_storage()
    if View.of(result, view.storage) == view and memory.nbytes() >= num_bytes:
        return memory
    memory = _memory(num_bytes)
    view.on(memory).copy_(result)
    return memory


def _memory(num_bytes: int) -> torch.UntypedStorage:
    return torch.UntypedStorage(num_bytes)  # type: ignore[no-untyped-call]


def _default_dtype(dtype: torch.dtype) -> Any:
    return nullcontext() if dtype == torch.get_default_dtype() else _DefaultDtype(dtype)


class _DefaultDtype:
    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __enter__(self) -> None:
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(self.before)
