"""Group and Links over torch.distributed: NCCL between GPUs, gloo between CPUs."""

from __future__ import annotations

import atexit
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.distributed as dist

# Early: the defaults of its functions keep a group that is there when it is imported, and with it an open port.
import torch.distributed.nn.functional

from trainfleet.comm.environment import RankEnvironment
from trainfleet.comm.group import DEADLINE, Array, Json, Reduction
from trainfleet.comm.rendezvous import meet
from trainfleet.errors import PeerError
from trainfleet.stopwatch import timed

if TYPE_CHECKING:
    from collections.abc import Iterator

_OPS = {"sum": dist.ReduceOp.SUM, "mean": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}

# Torch 2.13 renamed it; remove when the oldest torch we take is 2.13.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def init_process_group(environment: RankEnvironment, *, device: str, timeout: timedelta = DEADLINE) -> None:
    """Make torch's default process group of the ranks of `environment`.

    Tensors in CPU memory travel by gloo, those of a GPU by NCCL. One rank alone opens no port.
    PeerError or LaunchError says who did not come, or came with other versions; then there is no group.
    """
    store = meet(environment, timeout=timeout)
    atexit.unregister(_let_gloo_finish)  # once is enough
    atexit.register(_let_gloo_finish)
    gpu = torch.device(device) if device.startswith("cuda") else None
    with _translated("meeting the other ranks", environment.rank, environment.world_size), _prefixed_once():
        dist.init_process_group(
            backend="cpu:gloo,cuda:nccl" if gpu else "gloo",
            store=store,
            rank=environment.rank,
            world_size=environment.world_size,
            timeout=timeout,
            device_id=gpu,
        )


_excepthooks: list[Any] = []
"""What prints errors that nobody catches: before torch put the rank in front of them, and since."""


@contextmanager
def _prefixed_once() -> Iterator[None]:
    """Around the making of a group: torch puts the rank in front of each line of an error, and again for each group."""
    if _excepthooks and sys.excepthook is _excepthooks[1]:
        sys.excepthook = _excepthooks[0]
    before = sys.excepthook
    yield
    _excepthooks[:] = [before, sys.excepthook]


def _let_gloo_finish(deadline_seconds: float = 5.0) -> None:
    """At the exit of Python: wait until gloo's threads rest.

    They drop the tensors of a collective a moment after its end, which takes Python's lock; while the interpreter
    shuts down, torch 2.13 aborts or hangs there. A thread that has something to do is runnable, or becomes so while
    this one sleeps without the lock.
    """
    rests, ends = 0, time.monotonic() + deadline_seconds
    while rests < 3 and time.monotonic() < ends:
        time.sleep(0.002)
        rests = rests + 1 if all(state == "S" for state in _states_of_gloo_threads()) else 0


def _states_of_gloo_threads() -> list[str]:
    """The kernel's letter for each, S where it waits; nothing where there is no /proc."""
    states = []
    for task in Path("/proc/self/task").glob("*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            name, _, rest = task.read_text().partition("(")[2].rpartition(")")
            if name == "pt_gloo_runloop":
                states.append(rest.split()[0])
    return states


def forget_layouts() -> None:
    """Drop what torch remembers of how DTensors of a mesh lie: one made anew looks the same, but has other groups."""
    if "torch.distributed.tensor" not in sys.modules:
        return
    from torch.distributed.tensor import DTensor, _redistribute

    DTensor._op_dispatcher.sharding_propagator.propagate_op_sharding.cache_clear()  # type: ignore
    getattr(_redistribute._gen_transform_infos, "cache_clear", lambda: None)()
    getattr(torch._C, "_clear_DTensor_sharding_propagator_cache", lambda: None)()  # torch 2.11 may have none


class TorchGroup:
    """A `Group` and `Links` over a process group. NumPy arrays travel as tensors that share their memory."""

    def __init__(self, process_group: dist.ProcessGroup, *, name: str = "") -> None:
        self.process_group = process_group
        self.name = name

    @property
    def rank(self) -> int:
        return self.process_group.rank()

    @property
    def size(self) -> int:
        return self.process_group.size()

    def __repr__(self) -> str:
        return f"TorchGroup({self.name or self.process_group.group_name}, rank {self.rank} of {self.size})"

    def all_reduce_(self, array: Array, op: Reduction = "sum") -> TorchWork:
        tensor = _tensor(array)
        _check_reduction(tensor, op)
        if self.size == 1:  # gloo would hand it to a thread and back
            return self._work(None, "all_reduce_")
        with self._translated("all_reduce_"):
            work = dist.all_reduce(tensor, _OPS[op], group=self.process_group, async_op=True)
        # gloo has no mean; a sum divided afterwards is the same number on every backend.
        return self._work(work, "all_reduce_", (lambda: tensor.div_(self.size)) if op == "mean" else None)

    def broadcast_(self, array: Array, source: int = 0) -> TorchWork:
        if self.size == 1 and source == 0:
            return self._work(None, "broadcast_")
        with self._translated("broadcast_"):
            work = dist.broadcast(_tensor(array), group=self.process_group, group_src=source, async_op=True)
        return self._work(work, "broadcast_")

    def all_gather(self, array: Array) -> list[Array]:
        tensor = _tensor(array).contiguous()
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        with self._translated("all_gather"):
            dist.all_gather(parts, tensor, group=self.process_group)
        return [_like(array, part) for part in parts]

    def reduce_scatter(self, array: Array, op: Literal["sum", "mean"] = "sum") -> Array:
        tensor = _tensor(array).contiguous()
        _check_reduction(tensor, op)
        if tensor.dim() == 0 or len(tensor) % self.size:
            raise ValueError(f"reduce_scatter over {self.size} ranks cannot cut the shape {tuple(array.shape)}.")
        part = tensor.new_empty((len(tensor) // self.size, *tensor.shape[1:]))
        with self._translated("reduce_scatter"):
            _reduce_scatter(part, tensor, group=self.process_group)
        return _like(array, part.div_(self.size) if op == "mean" else part)

    def exchange(self, value: Json) -> list[Json]:
        # Always in CPU memory: waiting for these few bytes must not drain the queue of a GPU.
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = torch.zeros(self.size, dtype=torch.int64)
        lengths[self.rank] = len(text)
        self.all_reduce_(lengths).wait()
        padded = torch.zeros(int(lengths.max()), dtype=torch.uint8)
        padded[: len(text)] = text
        parts = self.all_gather(padded)
        return [json.loads(bytes(part[:length].tolist())) for part, length in zip(parts, lengths.tolist(), strict=True)]

    def barrier(self, timeout: timedelta | None = None) -> None:
        with self._translated("barrier"):
            # The monitored kind names the ranks that did not come.
            self.process_group.monitored_barrier(timeout or DEADLINE, True)  # type: ignore[attr-defined]

    def split(self, colour: int, name: str = "") -> TorchGroup:
        colours = self.exchange(colour)
        ranks = dist.get_process_group_ranks(self.process_group)
        own = self.process_group
        for each in sorted(set(colours)):  # every rank makes all of them, in the same order
            alike = [rank for rank, theirs in zip(ranks, colours, strict=True) if theirs == each]
            made = dist.new_group(alike, use_local_synchronization=len(ranks) < dist.get_world_size())
            own = made if each == colour else own
        return TorchGroup(own, name=name)

    def send(self, array: Array, to: int) -> TorchWork:
        with self._translated("send"):
            work = dist.isend(_tensor(array).contiguous(), group=self.process_group, group_dst=to)
        return self._work(work, f"send to {to}")

    def recv_(self, array: Array, source: int) -> TorchWork:
        with self._translated("recv_"):
            work = dist.irecv(_tensor(array), group=self.process_group, group_src=source)
        return self._work(work, f"recv_ from {source}")

    def all_to_all(self, arrays: Sequence[Array]) -> list[Array]:
        if len(arrays) != self.size:
            raise ValueError(f"all_to_all over {self.size} ranks got {len(arrays)} arrays; it takes one for each.")
        tensors = [_tensor(array) for array in arrays]
        shapes = [sent[self.rank] for sent in self.exchange([list(t.shape) for t in tensors])]
        counts = [int(np.prod(shape, dtype=np.int64)) for shape in shapes]
        received = tensors[0].new_empty(sum(counts))
        flat = torch.cat([t.reshape(-1) for t in tensors])
        with self._translated("all_to_all"):
            dist.all_to_all_single(received, flat, counts, [t.numel() for t in tensors], group=self.process_group)
        return [
            _like(arrays[0], part.view(shape))
            for part, shape in zip(torch.split(received, counts), shapes, strict=True)
        ]

    def _work(self, work: Any, operation: str, finish: Callable[[], object] | None = None) -> TorchWork:
        return TorchWork(work, self._translated, operation, finish)

    def _translated(self, operation: str) -> Any:
        return _translated(operation, self.rank, self.size, self.name)


class TorchWork:
    """A collective of torch under way."""

    def __init__(
        self, work: Any, translated: Callable[[str], Any], operation: str, finish: Callable[[], object] | None
    ) -> None:
        self._work = work
        self._translated = translated
        self._operation = operation
        self._finish = finish

    def wait(self, timeout: timedelta | None = None) -> None:
        with self._translated(self._operation):
            if self._work is not None:
                self._work.wait() if timeout is None else self._work.wait(timeout)
        finish, self._finish, self._work = self._finish, None, None
        if finish is not None:
            finish()


@contextmanager
def _translated(operation: str, rank: int, size: int, name: str = "") -> Iterator[None]:
    """What torch raises when a peer is gone or late, as PeerError; the time inside is that of communication."""
    began = time.monotonic()
    try:
        with timed("communication"):
            yield
    except (dist.DistError, RuntimeError) as exc:
        where = f" along {name}" if name else ""
        cause = str(exc).split("\nException raised from")[0].strip()
        raise PeerError(
            f"Rank {rank} of {size}{where}: {operation} failed after {time.monotonic() - began:.1f} s, "
            f"because a peer is gone, late, or made another call. {cause}",
            hint="Look at the report of the rank that failed first.",
        ) from exc


def _check_reduction(tensor: torch.Tensor, op: str) -> None:
    if op not in _OPS:
        raise ValueError(f"The reduction is {op!r}; use one of {', '.join(_OPS)}.")
    if op == "mean" and not (tensor.is_floating_point() or tensor.is_complex()):
        raise TypeError(f"The mean of {tensor.dtype} is no {tensor.dtype}; reduce by 'sum', or convert first.")


def _tensor(array: Array) -> torch.Tensor:
    return array if isinstance(array, torch.Tensor) else torch.from_numpy(array)


def _like(array: Array, tensor: torch.Tensor) -> Array:
    return tensor if isinstance(array, torch.Tensor) else tensor.numpy()
