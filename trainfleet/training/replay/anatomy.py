"""Anatomy: what every module gave in one step, its gradients and its update, in the order of computation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainfleet.comm.group import Group
from trainfleet.parallel.layout import piece_of
from trainfleet.parallel.torch_private import offsets_in_whole
from trainfleet.training.inspection.finding import plain_number
from trainfleet.training.inspection.values import Tally
from trainfleet.training.inspection.watch import Watch


@dataclass(slots=True)
class Part:
    """One module, over all micro-batches of all ranks."""

    module: str
    kind: str
    """Its class."""
    outputs: Tally = field(default_factory=Tally)
    gradients: Tally = field(default_factory=Tally)
    """Of its outputs."""
    parameters: float | None = None
    """The Euclidean norm of its own parameters before the update; None where it has none."""
    parameter_gradients: float | None = None
    """Of their gradients, clipped."""
    updates: float | None = None
    """Of their change by the update."""

    @property
    def update_ratio(self) -> float | None:
        if self.updates is None or not self.parameters:
            return None
        return self.updates / self.parameters

    def to_plain(self) -> dict[str, Any]:
        told = asdict(self)
        for name in ("outputs", "gradients"):
            tally: Tally = getattr(self, name)
            told[name] = {
                "elements": tally.count,
                "not_finite": tally.not_finite,
                "largest": tally.largest,
                "mean": plain_number(tally.mean),
                "zeros": tally.share_of_zeros,
            }
        for name in ("parameters", "parameter_gradients", "updates"):
            told[name] = None if told[name] is None else plain_number(told[name])
        ratio = self.update_ratio
        return {**told, "update_ratio": None if ratio is None else plain_number(ratio)}


Sums = dict[str, tuple[list[int], list[float | str]]]
"""By parameter: where this rank's piece begins and ends, and sums of squares over it, as JSON holds them."""


def before_update(model: nn.Module) -> dict[str, Tensor]:
    """Copies of this rank's pieces of the parameters."""
    return {name: piece_of(parameter).clone() for name, parameter in model.named_parameters()}


def gradients_now(model: nn.Module) -> dict[str, Tensor]:
    """Copies of this rank's pieces of the gradients that stand in the parameters."""
    return {name: piece_of(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}


def anatomy_of(
    model: nn.Module, watch: Watch, before: dict[str, Tensor], gradients: dict[str, Tensor], group: Group
) -> list[Part]:
    """Of all ranks, on each of them; `model` has been updated since `before`. A collective."""
    mine = {
        name: [_plain(tallies.outputs), _plain(tallies.gradients), type(model.get_submodule(name)).__name__]
        for name, tallies in watch.tallies.items()
    }
    parts: dict[str, Part] = {}
    for told in group.exchange(mine):
        for name, (outputs, its_gradients, kind) in told.items():
            part = parts.setdefault(name, Part(name, kind))
            part.outputs.join(Tally(*outputs))
            part.gradients.join(Tally(*its_gradients))
    squares: dict[str, list[float]] = {}
    seen: set[tuple[str, tuple[int, ...]]] = set()
    for sums in group.exchange(_sums(model, before, gradients)):
        for name, (place, values) in sums.items():
            if (name, tuple(place)) in seen:
                continue  # a copy
            seen.add((name, tuple(place)))
            own = squares.setdefault(name.rpartition(".")[0], [0.0, 0.0, 0.0])
            squares[name.rpartition(".")[0]] = [a + float(b) for a, b in zip(own, values)]
    for name, (weights, of_gradients, changes) in squares.items():
        part = parts.setdefault(name, Part(name, "not called"))
        part.parameters, part.parameter_gradients, part.updates = (
            math.sqrt(weights),
            math.sqrt(of_gradients),
            math.sqrt(changes),
        )
    return list(parts.values())


def _plain(tally: Tally) -> list[Any]:
    return [plain_number(each) if isinstance(each, float) else each for each in asdict(tally).values()]


def _sums(model: nn.Module, before: dict[str, Tensor], gradients: dict[str, Tensor]) -> Sums:
    found: Sums = {}
    for name, parameter in model.named_parameters():
        now, was = piece_of(parameter), before[name]
        if not now.numel():
            continue
        offsets = offsets_in_whole(parameter) if isinstance(parameter, DTensor) else (0,) * now.ndim
        gradient = gradients.get(name)
        values = [was, gradient if gradient is not None else torch.zeros(()), now - was]
        found[name] = (
            [*offsets, *now.shape],
            [plain_number(float(each.double().square().sum())) for each in values],
        )
    return found


COLUMNS = ("module", "largest", "mean", "zeros", "not finite", "largest grad", "grad not finite", "update / weight")


def table(parts: Sequence[Part]) -> list[str]:
    """Lines for a person: the output of each module, its gradient, and how far its own parameters moved."""
    rows: list[Sequence[str]] = [COLUMNS]
    for part in parts:
        out, back = part.outputs, part.gradients
        ratio = part.update_ratio
        rows.append(
            (
                part.module or "the model",
                f"{out.largest:.3g}" if out.count else "-",
                f"{out.mean:.3g}" if out.count else "-",
                f"{out.share_of_zeros:.1%}" if out.count else "-",
                f"{out.not_finite:,}" if out.not_finite else "-",
                f"{back.largest:.3g}" if back.count else "-",
                f"{back.not_finite:,}" if back.not_finite else "-",
                f"{ratio:.2g}" if ratio is not None else "-",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]).rstrip()
        for row in rows
    ]
