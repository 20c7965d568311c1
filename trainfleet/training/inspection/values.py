"""What a tensor holds: whether all of it is finite, where it is not, and how large it is. Of pieces, this rank's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from trainfleet.parallel.layout import piece_of

MOST_LINES = 4096
"""Lines of a dimension whose numbers are kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Values:
    """What a tensor held, in a few numbers."""

    shape: tuple[int, ...]
    dtype: str
    num_nan: int
    num_plus_inf: int
    num_minus_inf: int
    largest: float
    """The largest magnitude among those that are finite; 0 where none is."""

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def has_nan(self) -> bool:
        return self.num_nan > 0

    @property
    def is_minus_inf_alone(self) -> bool:
        """As masks are."""
        return self.num_minus_inf > 0 and self.num_nan == self.num_plus_inf == 0

    def __str__(self) -> str:
        counts = {"nan": self.num_nan, "inf": self.num_plus_inf, "-inf": self.num_minus_inf}
        found = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count) or "all finite"
        return f"{found} of {self.num_elements:,} ({self.dtype} {list(self.shape)}; finite up to {self.largest:.3g})"

    def to_plain(self) -> dict[str, Any]:
        return {**asdict(self), "shape": list(self.shape)}

    @classmethod
    def from_plain(cls, told: Mapping[str, Any]) -> Values:
        return cls(**{**told, "shape": tuple(told["shape"])})


@dataclass(frozen=True, slots=True)
class Lines:
    """Which lines of the first two dimensions hold something that is not finite: by dimension, (length, numbers)."""

    found: tuple[tuple[int, tuple[int, ...]], ...]

    def samples_of(self, num_samples: int) -> tuple[int, ...] | None:
        """The rows of a micro-batch of so many samples that these lines belong to; None where that cannot be told.

        A dimension is that of samples where it has their length, or, the first, a multiple of it: then the samples lie
        one after the other, as where positions were flattened into them.
        """
        for length, lines in self.found:
            if length == num_samples:
                return lines
        if self.found and num_samples and self.found[0][0] and self.found[0][0] % num_samples == 0:
            length, lines = self.found[0]
            return tuple(sorted({line // (length // num_samples) for line in lines}))
        return None


def is_number(value: Any) -> bool:
    """Whether something is a tensor that can hold what is not finite."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()) and not value.is_meta


def is_sound(tensor: Tensor) -> bool:
    """Whether every element that this rank has is finite."""
    return bool(torch.isfinite(piece_of(tensor)).all())


def values_of(tensor: Tensor) -> Values:
    piece = _real(piece_of(tensor))
    finite = piece[torch.isfinite(piece)]
    return Values(
        shape=tuple(piece.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        num_nan=int(torch.isnan(piece).sum()),
        num_plus_inf=int(torch.isposinf(piece).sum()),
        num_minus_inf=int(torch.isneginf(piece).sum()),
        largest=float(finite.abs().max()) if finite.numel() else 0.0,
    )


def lines_of(tensor: Tensor) -> Lines:
    """Where it is not finite; nothing of what lies in pieces along its first dimension, or has none."""
    if isinstance(tensor, DTensor) and any(isinstance(each, Shard) and each.dim == 0 for each in tensor.placements):
        return Lines(())
    bad = ~torch.isfinite(piece_of(tensor))
    found = []
    for dim in range(min(bad.ndim, 2)):
        others = [each for each in range(bad.ndim) if each != dim]
        lines = (bad.sum(others) if others else bad).nonzero().flatten()[:MOST_LINES]
        found.append((bad.shape[dim], tuple(lines.tolist())))
    return Lines(tuple(found))


@dataclass(slots=True)
class Tally:
    """What several tensors held together; sums of it over micro-batches and ranks are sums of its fields."""

    count: int = 0
    finite: int = 0
    zeros: int = 0
    total: float = 0.0
    """Of the finite ones."""
    largest: float = 0.0

    def add(self, tensor: Tensor) -> None:
        piece = _real(piece_of(tensor))
        finite = piece[torch.isfinite(piece)]
        self.count += piece.numel()
        self.finite += finite.numel()
        self.zeros += int((piece == 0).sum())
        if finite.numel():
            self.total += float(finite.double().sum())
            self.largest = max(self.largest, float(finite.abs().max()))

    def join(self, other: Tally) -> None:
        self.count, self.finite, self.zeros = (
            self.count + other.count,
            self.finite + other.finite,
            self.zeros + other.zeros,
        )
        self.total, self.largest = self.total + other.total, max(self.largest, other.largest)

    @property
    def mean(self) -> float:
        return self.total / self.finite if self.finite else math.nan

    @property
    def share_of_zeros(self) -> float:
        return self.zeros / self.count if self.count else 0.0

    @property
    def not_finite(self) -> int:
        return self.count - self.finite


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
