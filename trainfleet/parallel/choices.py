"""Choices: what a model takes by comparing numbers, such as the experts of a token, where rounding could decide.

Numbers that are almost equal are ordered by how their sums were rounded, and from such a choice on nothing is
comparable: another expert gives another result. Who compares two runs lets the first tell what it chose there, and the
second take the same. Only there: a choice between numbers that differ is each run's own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten

NEAR = 4.0
"""How many times further apart than the tolerance two rows of numbers may be and still be the same row."""


@dataclass(frozen=True, slots=True)
class Kind:
    """Choices that can be told from each other only by their numbers."""

    step: int
    width: int
    """Of how many numbers."""
    count: int
    """How many of them are taken, the largest first."""


@dataclass(frozen=True, slots=True)
class Ties:
    """Rows of numbers [N, width], float32, between which rounding could decide, and what was taken [N, count]."""

    rows: NDArray[np.float32]
    taken: NDArray[np.int64]


class Choices(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, sees what topk, argmax and max along the last dimension of plain tensors take.

    Numbers of a row are almost equal where they differ by less than `tolerance` of the distance between the largest
    and the smallest one.
    """

    def __init__(self, tolerance: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.step = 0
        self._tolerance = tolerance

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in _COUNTS or type(args[0]) is not Tensor or not args[0].is_floating_point() or kwargs:
            return result
        values = args[0]
        count = _COUNTS[func](values, *args[1:])
        if not count or not values.numel():
            return result
        rows = values.detach().reshape(-1, values.shape[-1]).float()
        kind = Kind(self.step, rows.shape[-1], count)
        indices = result[1] if isinstance(result, tuple) else result
        settled = self._settled(kind, rows, indices.reshape(-1, count))
        if settled is None:
            return result
        settled = settled.reshape(indices.shape)
        if not isinstance(result, tuple):
            return settled
        at = settled if settled.ndim == values.ndim else settled.unsqueeze(-1)
        return values.gather(-1, at).reshape(indices.shape), settled

    def _settled(self, kind: Kind, rows: Tensor, taken: Tensor) -> Tensor | None:
        """What is taken instead, [N, count]; None where it is what was."""
        raise NotImplementedError

    def _spread(self, rows: Tensor) -> Tensor:
        """How far apart numbers of each row may be and still be almost equal, [N, 1]."""
        return self._tolerance * (rows.amax(-1, keepdim=True) - rows.amin(-1, keepdim=True))


class Telling(Choices):  # type: ignore[no-untyped-call]
    """Keeps the choices in which rounding could decide."""

    def __init__(self, tolerance: float) -> None:
        super().__init__(tolerance)
        self._found: defaultdict[Kind, list[tuple[Tensor, Tensor]]] = defaultdict(list)

    def _settled(self, kind: Kind, rows: Tensor, taken: Tensor) -> None:
        largest = rows.topk(min(kind.count + 1, kind.width)).values
        # Twice: both runs are rounded.
        is_near = ((largest[:, :-1] - largest[:, 1:]) <= 2 * self._spread(rows)).any(-1)
        if is_near.any():
            self._found[kind].append((rows[is_near].cpu(), taken[is_near].cpu()))

    def ties(self) -> dict[Kind, Ties]:
        return {
            kind: Ties(torch.cat([rows for rows, _ in found]).numpy(), torch.cat([taken for _, taken in found]).numpy())
            for kind, found in self._found.items()
        }


class Taking(Choices):  # type: ignore[no-untyped-call]
    """Takes what another run took, where the numbers are the same but for rounding, and rounding decides."""

    def __init__(self, tolerance: float, ties: Mapping[Kind, Ties]) -> None:
        super().__init__(tolerance)
        self._ties = ties

    def _settled(self, kind: Kind, rows: Tensor, taken: Tensor) -> Tensor | None:
        if kind not in self._ties:
            return None
        known = torch.from_numpy(self._ties[kind].rows).to(rows.device)
        distance, nearest = torch.cdist(rows, known, compute_mode="donot_use_mm_for_euclid_dist").min(-1)
        size = (rows - rows.mean(-1, keepdim=True)).norm(dim=-1)
        theirs = torch.from_numpy(self._ties[kind].taken).to(rows.device)[nearest]
        apart = (rows.gather(-1, taken) - rows.gather(-1, theirs)).abs()
        is_tie = (apart <= 2 * self._spread(rows)).all(-1) & (distance <= NEAR * self._tolerance * size)
        return torch.where(is_tie[:, None], theirs, taken)


def taking(tolerance: float, ties: Mapping[Kind, Ties]) -> Taking | None:
    """What takes `ties`; None where there are none, for each operator passes through it."""
    return Taking(tolerance, ties) if ties else None


def _of_topk(values: Tensor, k: int, dim: int = -1, largest: bool = True, is_sorted: bool = True) -> int:
    return k if values.ndim and dim in (-1, values.ndim - 1) and largest else 0


def _of_largest(values: Tensor, dim: int | None = None, keepdim: bool = False) -> int:
    return 1 if values.ndim and dim in (-1, values.ndim - 1) else 0


_COUNTS: dict[Any, Callable[..., int]] = {
    _aten.topk.default: _of_topk,
    _aten.argmax.default: _of_largest,
    _aten.max.dim: _of_largest,
}
"""How many numbers of a row a function takes, from its arguments; 0 where it is not followed."""
