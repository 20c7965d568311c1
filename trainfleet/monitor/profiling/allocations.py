"""What torch's allocators gave out and took back while they were followed, and in which named ranges that was.

The account is the allocator's own: torch's profiler hears of every block, of those inside of operators and of
compiled code too, on the CPU and on GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from trainfleet.monitor.profiling.torch_profiler import new_profiler

PHASE, MODULE = "phase: ", "module: "
"""How the names of ranges begin that tell the phase of a step, and the module whose forward runs."""
_BACKWARD, _OPTIMIZER = "autograd::engine::evaluate_function", "Optimizer.step#"
COLLECTIVES = ("c10d::", "gloo:", "nccl:")
"""Likewise those of collectives."""
_OURS = (PHASE, MODULE, _BACKWARD, _OPTIMIZER, "FSDP::", "ProfilerStep")


@dataclass(slots=True)
class Block:
    """Memory that an allocator gave out in one piece."""

    device: str
    """As torch writes it: cpu, cuda:0."""
    address: int
    size_bytes: int
    made: int
    """Nanoseconds since 1970, as `freed`."""
    freed: int | None = None
    """None where it lived on."""
    ranges: tuple[str, ...] = ()
    """The ranges and operators in which it was made, the outermost first."""
    shape: tuple[int, ...] | None = None
    """Of the first tensor that an operator was seen to read there; None where none did."""
    handed_over: int | None = None
    """When it was last given to a collective. Then a thread of the backend, which nobody follows, may end it unseen."""
    used: int | None = None
    """When an operator was last seen to read or write it."""
    is_end_seen: bool = False
    """Whether `freed` was seen, and not only that something else lies there now."""

    @property
    def module(self) -> str:
        """The name of the innermost module whose forward made it; empty outside of all of them."""
        names = (name for name in reversed(self.ranges) if name.startswith(MODULE))
        return next(names, MODULE).removeprefix(MODULE)

    @property
    def operator(self) -> str:
        """What was called when it was made, without what that called in turn."""
        return next((name for name in reversed(self.ranges) if not name.startswith(_OURS)), "")

    def is_in(self, prefix: str | tuple[str, ...]) -> bool:
        """Whether it was made in a range whose name begins so."""
        return any(name.startswith(prefix) for name in self.ranges)

    @property
    def is_of_backward(self) -> bool:
        return self.is_in(_BACKWARD)


@dataclass(frozen=True, slots=True)
class Range:
    """A named stretch of time, in nanoseconds since 1970."""

    name: str
    begun: int
    ended: int


@dataclass(frozen=True, slots=True)
class Count:
    """An allocator's own account at one moment."""

    at: int
    device: str
    allocated_bytes: int
    reserved_bytes: int
    """Of the device in all, its cache included."""


@dataclass(frozen=True, slots=True)
class Followed:
    """What was seen."""

    blocks: tuple[Block, ...]
    """In the order in which they were made."""
    phases: tuple[Range, ...]
    """Those that were marked, or else those that show in what torch ran: forward, backward, optimizer."""
    counted: tuple[Count, ...]
    """What the allocators of GPUs counted by themselves."""
    collectives: tuple[int, ...]
    """When collectives began, in the order of time."""


class Allocations:
    """Follows the allocators from `start` until `stop`. It costs nothing before and afterwards."""

    def __init__(self) -> None:
        self._profiler: Any = None

    def start(self) -> None:
        """RuntimeError where another profiler of torch runs already: it has one at a time."""
        self._profiler = new_profiler()
        self._profiler.start()

    def stop(self) -> Followed:
        """What was seen since `start`."""
        assert self._profiler is not None, "start() comes before stop()"
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        return followed_in(profiler.profiler.kineto_results.experimental_event_tree())


def followed_in(roots: Sequence[Any]) -> Followed:
    """What is in the tree of events that torch's profiler made."""
    from torch._C._profiler import _EventType

    allocations: list[tuple[int, Any, tuple[str, ...]]] = []
    uses: list[_Use] = []
    ranges: list[Range] = []
    for event, names in _walk(roots):
        if event.tag == _EventType.Allocation:
            allocations.append((event.start_time_ns, event.extra_fields, names))
        elif event.tag == _EventType.TorchOp:
            ranges.append(Range(event.name, event.start_time_ns, event.end_time_ns))
            uses += _uses(event)
    allocations.sort(key=lambda each: each[0])
    uses.sort(key=lambda use: use.at)
    blocks = tuple(_blocks(allocations))
    _follow_uses(blocks, uses)
    counted = [Count(at, str(a.device), a.total_allocated, a.total_reserved) for at, a, _ in allocations]
    return Followed(
        blocks=blocks,
        phases=tuple(_phases(ranges)),
        counted=tuple(count for count in counted if count.reserved_bytes),
        collectives=tuple(sorted({use.at for use in uses if use.is_collective})),
    )


class _Use(NamedTuple):
    """An operator that reads or writes a tensor."""

    at: int
    address: int
    shape: tuple[int, ...]
    is_collective: bool


def _uses(event: Any) -> Iterator[_Use]:
    waiting = list(event.extra_fields.inputs)
    for each in waiting:
        if isinstance(each, list):
            waiting += each
        elif getattr(each, "storage_data_ptr", None):
            shape = tuple(each.sizes)
            yield _Use(event.start_time_ns, each.storage_data_ptr, shape, event.name.startswith(COLLECTIVES))


def _walk(roots: Sequence[Any]) -> Iterator[tuple[Any, tuple[str, ...]]]:
    """Every event with the names of those around it; an operator called by an operator is not named."""
    waiting: list[tuple[Any, tuple[str, ...]]] = [(root, ()) for root in roots]
    while waiting:
        event, names = waiting.pop()
        yield event, names
        if event.children:
            name = event.name
            inside = names if names and not (name.startswith(_OURS) or names[-1].startswith(_OURS)) else (*names, name)
            waiting += [(child, inside) for child in event.children]


def _blocks(allocations: Sequence[tuple[int, Any, tuple[str, ...]]]) -> Iterator[Block]:
    alive: dict[tuple[str, int], Block] = {}
    for at, allocation, names in allocations:
        place = str(allocation.device), allocation.ptr
        before = alive.pop(place, None)
        if before is not None:
            before.freed = at  # also where a thread freed it that nobody follows: its place is used again
            before.is_end_seen = allocation.alloc_size < 0
        if allocation.alloc_size > 0:
            block = alive[place] = Block(*place, allocation.alloc_size, at, ranges=names)
            if block.operator.startswith(COLLECTIVES):
                block.handed_over = at  # a copy that it made for itself
            yield block


def _follow_uses(blocks: Sequence[Block], uses: Sequence[_Use]) -> None:
    begins = iter(blocks)
    following = next(begins, None)
    alive: dict[int, Block] = {}
    for use in uses:
        while following is not None and following.made <= use.at:
            alive[following.address] = following
            following = next(begins, None)
        block = alive.get(use.address)
        if block is None or (block.freed is not None and block.freed <= use.at):
            continue
        block.shape, block.used = block.shape or use.shape, use.at
        if use.is_collective:
            block.handed_over = use.at


def _phases(ranges: Sequence[Range]) -> Iterator[Range]:
    """Those that were marked, the innermost where they lie in one another; else those that show by themselves."""
    marked = [Range(r.name.removeprefix(PHASE), r.begun, r.ended) for r in ranges if r.name.startswith(PHASE)]
    return _innermost(marked) if any(r.name == "backward" for r in marked) else _shown(ranges)


def _innermost(ranges: Sequence[Range]) -> Iterator[Range]:
    edges = sorted([(r.begun, 1, r) for r in ranges] + [(r.ended, 0, r) for r in ranges], key=lambda edge: edge[:2])
    open_: list[Range] = []
    since = 0
    for at, begins, range_ in edges:
        if open_ and at > since:
            yield Range(open_[-1].name, since, at)
        since = at
        if begins:
            open_.append(range_)
        else:
            open_.remove(range_)


def _shown(ranges: Sequence[Range]) -> Iterator[Range]:
    """Backward and optimizer by what torch names so. What comes before a backward is its forward."""
    found: list[Range] = []
    forwards = sorted(r.begun for r in ranges if r.name.startswith(MODULE))
    steps = [Range("backward", r.begun, r.ended) for r in ranges if r.name.startswith(_BACKWARD)]
    steps += [Range("optimizer", r.begun, r.ended) for r in ranges if r.name.startswith(_OPTIMIZER)]
    for range_ in sorted(steps, key=lambda r: r.begun):
        last = found[-1] if found else Range("other", 0, 0)
        if range_.begun < last.ended:
            continue  # a backward inside of a backward, an optimizer that steps others
        goes_on = range_.name == last.name == "backward"
        if goes_on and not any(last.ended < begun < range_.begun for begun in forwards):
            found[-1] = Range("backward", last.begun, range_.ended)
            continue
        found.append(range_)
    since = min((r.begun for r in ranges), default=0)
    for range_ in found:
        yield Range("forward" if range_.name == "backward" else "other", since, range_.begun)
        yield range_
        since = range_.ended
