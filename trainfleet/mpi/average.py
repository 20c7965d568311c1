"""Average gradients over ranks, or collect them: in buckets, fused, without waiting, with a codec if asked.

Small gradients are laid into buckets so that they share the cost of a message; large ones are averaged where they
lie. A bucket leaves as soon as it is full, while the next one is filled (Li et al., VLDB 2020, section 3.2).
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import numpy as np

from trainfleet.codec import BFloat16, Codec
from trainfleet.comm.group import Group, Links, Work
from trainfleet.errors import PeerError, PlanError
from trainfleet.mpi.arrays import Array, for_group, like, namespace, to_numpy

_Member: TypeAlias = tuple[Any, Array, Any]  # name, gradient, and the same as a NumPy array
T = TypeVar("T", Sequence[Any], Mapping[str, Any])

BUCKET_BYTES = 1 << 20
"""A bucket this large moves as fast as any (benchmarks/mpi_average.py), and copying into it costs the caches least."""


def average_gradients(grads: T, group: Group, codec: Codec | None = None, *, weight: float | None = None) -> T:
    """The mean over all ranks of each gradient, in the structure given: a list or a mapping.

    With `weight`, what this rank's gradients are summed over, it is the sum of gradients over the sum of weights.
    `grads` are used up: a large one becomes the mean itself. With a codec each rank's gradients are encoded before
    they travel; those of casts are added up in float32 and rounded once. All ranks pass equal names, shapes and dtypes
    in one order: PeerError on all of them names the first that is not.
    """
    average = GradientAverage(group, codec)
    named: Mapping[Any, Array] = grads if isinstance(grads, Mapping) else dict(enumerate(grads))
    refuse_unlike(list(named.items()), group)
    average.add_all(named.items())
    means = average.land(weight)
    if isinstance(grads, Mapping):
        return {name: means[name] for name in grads}  # type: ignore[return-value]
    return [means[index] for index in range(len(grads))]  # type: ignore[return-value]


class GradientAverage:
    """The same for gradients that come one by one, as a backward makes them: `add` each, `finish` gives all means."""

    def __init__(self, group: Group, codec: Codec | None = None, *, bucket_bytes: int = BUCKET_BYTES) -> None:
        self._group = group
        self._codec = codec
        self._bucket_bytes = bucket_bytes
        self._filling: dict[np.dtype[Any], _Bucket] = {}
        self._flights: list[_Flight] = []

    def add(self, name: Any, gradient: Array) -> None:
        """Take a gradient; all ranks add the same ones in the same order."""
        self.add_all([(name, gradient)])

    def add_all(self, named: Iterable[tuple[Any, Array]]) -> None:
        """`add` of each, in one loop: of thousands of small gradients, a call each would be half of the time."""
        dtype: Any = None
        bucket = _Bucket()
        for name, gradient in named:
            held = gradient if type(gradient) is np.ndarray else self._travelling(gradient)
            num_bytes = held.nbytes
            if num_bytes >= self._bucket_bytes:
                self._send([(name, gradient, held)], _in_a_row(held))
                continue
            if held.dtype is not dtype:
                dtype = held.dtype
                bucket = self._filling.setdefault(dtype, _Bucket())
            bucket.members.append((name, gradient, held))
            bucket.num_bytes += num_bytes
            if bucket.num_bytes >= self._bucket_bytes:
                self._send_bucket(dtype)
                dtype = None

    def _travelling(self, gradient: Array) -> Any:
        return for_group(gradient, self._group) if self._codec is None else to_numpy(gradient)

    def _send_bucket(self, dtype: np.dtype[Any]) -> None:
        members = self._filling.pop(dtype).members
        xp = namespace(members[0][2])
        self._send(members, xp.concatenate([held for _, _, held in members], axis=None))

    def _send(self, members: list[_Member], flat: Any) -> None:
        self._flights.append(_Flight(members, flat, self._group, self._codec))

    def finish(self, weight: float | None = None) -> dict[Any, Array]:
        """Send what is still here, wait for all, and give the means by name; then it is as new.

        PeerError where another rank added other gradients: it names the first one that is not alike.
        """
        self._send_rest()
        refuse_unlike([(name, held) for flight in self._flights for name, _, held in flight.members], self._group)
        return self.land(weight)

    def land(self, weight: float | None = None) -> dict[Any, Array]:
        """`finish` where the ranks are known to have added the same."""
        self._send_rest()
        factor = 1.0
        if weight is not None:
            total = np.array([float(weight)])
            self._group.all_reduce_(total).wait()
            factor = self._group.size / total[0]
        means: dict[Any, Array] = {}
        for flight in self._flights:
            flat, at = flight.land(factor), 0
            for name, gradient, held in flight.members:
                end = at + held.size
                part = flat[at:end] if held.ndim == 1 else flat[at:end].reshape(held.shape)
                means[name] = part if held is gradient else like(gradient, part)
                at = end
        self._flights = []
        return means

    def _send_rest(self) -> None:
        for dtype in list(self._filling):
            self._send_bucket(dtype)


def refuse_unlike(named: Sequence[tuple[Any, Array]], group: Group) -> None:
    """PeerError on every rank where ranks have other names, shapes, dtypes or counts of arrays: it names the first."""
    if group.size == 1:
        return
    kinds = hash(
        tuple([(array.shape, array.dtype.num) for _, array in named])
    )  # of whole numbers, as hash is not of str
    names = zlib.crc32("\n".join([str(name) for name, _ in named]).encode())
    mark = np.array([kinds >> 32, kinds & 0xFFFFFFFF, names])
    most = np.concatenate([mark, -mark])
    group.all_reduce_(most, "max").wait()
    if (most[:3] == mark).all() and (most[3:] == -mark).all():
        return
    rows = group.exchange([[str(name), str(array.dtype), list(array.shape)] for name, array in named])
    for rank, row in enumerate(rows):
        for number, (mine, theirs) in enumerate(itertools.zip_longest(rows[0], row)):
            if mine != theirs:
                raise PeerError(
                    f"Ranks bring unlike arrays: number {number} is {_described(mine)} on rank 0 of {group.size}, "
                    f"{_described(theirs)} on rank {rank} ({len(rows[0])} and {len(row)} arrays in all).",
                    hint="Build the same model on every rank, and give all ranks the same gradients in one order.",
                )


def _described(row: Any) -> str:
    return "none" if row is None else f"{row[0]!r} {row[1]} {tuple(row[2])}"


def _in_a_row(held: Any) -> Any:
    """All numbers as one array that may be written: a view where that can be."""
    flat = held.reshape(-1)
    is_fine = flat.flags.c_contiguous and getattr(flat.flags, "writeable", True)
    return flat if is_fine else flat.copy()


@dataclass(slots=True)
class _Bucket:
    members: list[_Member] = field(default_factory=list)
    num_bytes: int = 0


class _Flight:
    """A bucket under way, encoded or as it is."""

    def __init__(self, members: list[_Member], flat: Any, group: Group, codec: Codec | None) -> None:
        self.members = members
        self._flat = flat
        self._group = group
        self._codec = codec
        self._work: Work | None = None
        self._parts: tuple[Any, ...] = ()
        if codec is None or flat.dtype.kind != "f":
            self._codec = None
            self._work = group.all_reduce_(flat, "mean")
            return
        self._parts = codec.encode(flat)
        if _is_cast(self._parts, flat):
            self._work = group.all_reduce_(_numbers(self._parts[0], codec), "mean")

    def land(self, factor: float) -> Any:
        if self._work is not None:
            self._work.wait()
        if self._codec is not None:
            self._flat[...] = self._codec.decode(self._parts) if self._work is not None else self._gathered()
        if factor != 1.0:
            np.multiply(self._flat, factor, out=self._flat)
        return self._flat

    def _gathered(self) -> Any:
        """Encoded parts that are no numbers of the same places cannot be added: each rank's are decoded."""
        assert self._codec is not None
        total = np.zeros(self._flat.shape, np.float32)
        for parts in zip(*(self._group.all_gather(part) for part in self._parts), strict=True):
            total += self._codec.decode(parts)
        return total / self._group.size


def _is_cast(parts: tuple[Any, ...], flat: Any) -> bool:
    return len(parts) == 1 and parts[0].shape == flat.shape and parts[0].dtype.itemsize == 2


def _numbers(words: Any, codec: Codec) -> Any:
    """bfloat16 is words of 16 bits in NumPy; those who add it up must know."""
    if not isinstance(codec, BFloat16):
        return words
    import ml_dtypes

    return words.view(ml_dtypes.bfloat16)


def collect(grads: Array | Mapping[str, Array], group: Group, to: int = 0) -> list[Any] | None:
    """What all ranks give, by rank, on rank `to`; None on the others. Arrays, or mappings of the same names.

    Shapes may differ. PlanError, on all ranks, where the names do.
    """
    if isinstance(grads, Mapping):
        names = group.exchange(list(grads))
        if odd := [rank for rank, each in enumerate(names) if each != names[0]]:
            raise PlanError(
                f"Rank {odd[0]} collects {', '.join(names[odd[0]]) or 'nothing'}, and rank 0 "
                f"{', '.join(names[0]) or 'nothing'}. Give the same names in the same order on every rank."
            )
        columns = [_collected(array, group, to) for array in grads.values()]
        if group.rank != to:
            return None
        return [dict(zip(grads, (column[rank] for column in columns))) for rank in range(group.size)]
    parts = _collected(grads, group, to)
    return parts if group.rank == to else None


def _collected(array: Array, group: Group, to: int) -> list[Array]:
    assert isinstance(group, Links)
    held = to_numpy(array)
    shapes = group.exchange([str(held.dtype), list(held.shape)])
    if group.rank != to:
        group.send(held, to).wait()
        return []
    parts = [np.array(held) if rank == to else np.empty(shape, dtype) for rank, (dtype, shape) in enumerate(shapes)]
    for work in [group.recv_(part, rank) for rank, part in enumerate(parts) if rank != to]:
        work.wait()
    return [like(array, part) for part in parts]
