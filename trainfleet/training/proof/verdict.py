"""Verdict: how far what a plan computed is from what one process computed, and whether rounding explains it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Trace = dict[str, NDArray[Any]]
"""Every tensor that was compared, by name, in the order in which it was computed."""

ACTIVATION = "step 1, micro-batch "
"""How the names of what modules gave begin: «step 1, micro-batch 3, output of blocks.0»."""

TOLERANCE = {"fp32": 2e-5, "bf16": 3e-2, "fp16": 4e-3}
"""Relative deviation, by the Euclidean norm of a tensor, that rounding explains: sums of a few hundred float32
products in another order (2^-24 each), and a few roundings to bf16 (2^-9) and fp16 (2^-12)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """How far a tensor is from that of one process."""

    tensor: str
    deviation: float
    """|a - b| / |b|, by the Euclidean norm."""
    tolerance: float

    @property
    def explained(self) -> bool:
        """Whether the rounding of the precision explains it."""
        return self.deviation <= self.tolerance


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What the comparison found."""

    compared: int
    first: Difference | None
    """The first tensor, in the order of computation, that rounding does not explain."""
    largest: Difference
    """The largest deviation of all, measured by its tolerance."""
    remarks: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        return self.first is None

    def __str__(self) -> str:
        if self.first is not None:
            return (
                f"The plan does not compute what one process computes. First to differ: {self.first.tensor}, by "
                f"{self.first.deviation:.1e} of its norm; rounding explains {self.first.tolerance:.1e}."
            )
        return (
            f"The plan computes what one process computes: {self.compared} tensors agree; the largest deviation is "
            f"{self.largest.deviation:.1e} ({self.largest.tensor}), rounding explains {self.largest.tolerance:.1e}."
        )


NOISE = {"fp32": 1e-5, "bf16": 1e-3, "fp16": 1e-4}
"""An element whose gradient is less than this part of the usual one (the root mean square of all) is rounding alone.
Attention has such elements: the bias of its keys changes no softmax, so its gradient is what sums leave that should be
zero. Adam makes steps of full size out of them, in any direction."""

SMALL = 0.01
"""A gradient whose elements are less than this part of the usual one counts as if they were as large: what its sums
were rounded by came with larger numbers."""

ROUNDED_SLACK = 3.0
"""How much further off a plan may be than a reference that was rounded in another way: of those there are few, and
ranks that share a sum each round their part of it, and then the sum of the parts."""

CONCATENATED_SLACK = {"fp32": 4.0, "bf16": 4.0, "fp16": 8.0}
"""Where one process takes the micro-batches of all ranks as one, it rounds the gradient of their sum once, and the
ranks round each of theirs; Adam then makes steps of full size out of what differs in small gradients. In fp16 a bias
near zero was seen to be off by 2 % after 20 steps, the same at every ZeRO stage."""


def is_activation(name: str) -> bool:
    """Whether a tensor of a trace is what a module gave."""
    return name.startswith(ACTIVATION)


def joined(traces: Sequence[Trace]) -> Trace:
    """One trace of what several ranks saw; of what more than one has, the first counts."""
    together: Trace = {}
    for each in traces:
        together = {**each, **together}
    return together


def compare(
    reference: Trace,
    found: Trace,
    precision: str,
    *,
    slack: float = 1.0,
    rounded: Sequence[Trace] = (),
    remarks: Sequence[str] = (),
) -> Verdict:
    """Compare traces; a tensor that only one of them has deviates without bound.

    `slack` multiplies the tolerance. `rounded` are references that were rounded in another way: with gradients shaken
    by as much as rounding explains, or in float32; what those are off by is explained as well, ROUNDED_SLACK times
    over. Adam divides a gradient by its own size, so it makes much of small ones; bfloat16 makes much of deep models.
    A tensor that is not finite agrees where the same elements are not finite: fp16 overflows, and skips, alike.
    Elements of parameters whose gradient is rounding alone (NOISE) are not compared; nor what a module gave that the
    plan never calls as one process does: a pipeline never calls a list of layers that lies on several ranks.
    """
    tolerance = TOLERANCE[precision] * slack
    usual = _usual_gradients(reference)
    noise = _noise(reference, usual, precision)
    differences = []
    reference, found = _called_alike(reference, found), _called_alike(found, reference)
    for name in [*reference, *(name for name in found if name not in reference)]:
        step, _, what = name.partition(", ")
        floor = SMALL * usual.get(step, 0.0) if what.startswith("gradient of ") else 0.0
        aside = noise.get(what.removeprefix("parameter ")) if what.startswith("parameter ") else None
        deviation = _deviation(found.get(name), reference.get(name), floor=floor, aside=aside)
        made_of_it = [_deviation(each.get(name), reference.get(name), floor=floor, aside=aside) for each in rounded]
        explained = max(tolerance, *(ROUNDED_SLACK * each for each in made_of_it if each < float("inf")), 0.0)
        differences.append(Difference(tensor=name, deviation=deviation, tolerance=explained))
    return Verdict(
        compared=len(differences),
        first=next((difference for difference in differences if not difference.explained), None),
        largest=max(differences, key=lambda each: each.deviation / each.tolerance),
        remarks=(*remarks, *_said_of(noise)),
    )


def _called_alike(trace: Trace, other: Trace) -> Trace:
    """`trace` without what modules gave that the other never calls, or calls in parts on several ranks; and without
    that of modules whose shapes follow from numbers, as the tokens of one expert do."""
    called = {_module(name) for name in other if is_activation(name)}
    shapes: defaultdict[str, set[tuple[int, ...]]] = defaultdict(set)
    for name, value in (*trace.items(), *other.items()):
        if is_activation(name):
            shapes[_module(name)].add(value.shape)
    alike = {module for module in called if len(shapes[module]) == 1}
    return {name: value for name, value in trace.items() if not is_activation(name) or _module(name) in alike}


def _module(activation: str) -> str:
    return activation.removeprefix(ACTIVATION).partition(", ")[2]


def _usual_gradients(reference: Trace) -> dict[str, float]:
    """By step, the root mean square over the elements of all gradients."""
    squares: defaultdict[str, float] = defaultdict(float)
    counts: defaultdict[str, int] = defaultdict(int)
    for name, value in reference.items():
        step, _, what = name.partition(", ")
        if what.startswith("gradient of "):
            squares[step] += float(np.square(np.abs(value[np.isfinite(value)]).astype(np.float64)).sum())
            counts[step] += value.size
    return {step: float(np.sqrt(squares[step] / max(1, counts[step]))) for step in squares}


def _noise(reference: Trace, usual: Mapping[str, float], precision: str) -> dict[str, NDArray[Any]]:
    """By parameter, the elements that in some step had a gradient, but only of rounding; without those of none.

    That is one below NOISE of the usual gradient, or below TOLERANCE of those of its own tensor: its sign may be any.
    """
    found: dict[str, NDArray[Any]] = {}
    for name, value in reference.items():
        step, _, what = name.partition(", ")
        if what.startswith("gradient of "):
            size = np.abs(value).astype(np.float64)
            parameter = what.removeprefix("gradient of ")
            own = np.sqrt(np.square(size[np.isfinite(size)]).mean()) if np.isfinite(size).any() else 0.0
            here = (size > 0) & (size < max(NOISE[precision] * usual[step], TOLERANCE[precision] * own))
            found[parameter] = found.get(parameter, False) | here
    return {name: elements for name, elements in found.items() if elements.any()}


def _said_of(noise: Mapping[str, NDArray[Any]]) -> tuple[str, ...]:
    if not noise:
        return ()
    count = sum(int(elements.sum()) for elements in noise.values())
    most = max(noise, key=lambda name: int(noise[name].sum()))
    return (
        f"{count} elements of parameters, most of them in {most}, have gradients of rounding alone. What an optimizer "
        "makes of those is arbitrary, so these elements of the parameters are not compared.",
    )


def _deviation(
    found: NDArray[Any] | None,
    reference: NDArray[Any] | None,
    *,
    floor: float = 0.0,
    aside: NDArray[Any] | None = None,
) -> float:
    """`floor` is the least size that elements of the reference count as; those `aside` do not count."""
    if found is None or reference is None or found.shape != reference.shape:
        return float("inf")
    wide = np.complex128 if np.iscomplexobj(reference) else np.float64
    a, b = found.astype(wide), reference.astype(wide)
    counts = np.isfinite(b)
    if not np.array_equal(counts, np.isfinite(a)):
        return float("inf")
    if aside is not None:
        counts = counts & ~aside
    distance = float(np.linalg.norm(a[counts] - b[counts]))
    size = max(float(np.linalg.norm(b[counts])), floor * float(np.sqrt(counts.sum())))
    if distance == 0:
        return 0.0
    return distance / size if size else float("inf")
