"""verify: does a plan compute what one process computes? Compared tensor by tensor, in the order of computation.

One process takes the micro-batches of all ranks one after the other; the ranks take their shares. Losses, gradient
norms, gradients and parameters after each step are gathered and compared, and the first that differs is named.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trainfleet.batch import Batch, arrays, map_arrays
from trainfleet.errors import RankFailed
from trainfleet.mesh import Mesh
from trainfleet.plan import LossScale, Plan

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

Trace = dict[str, NDArray[Any]]
"""Every tensor that was compared, by name, in the order in which it was computed."""

TOLERANCE = {"fp32": 2e-5, "bf16": 3e-2, "fp16": 4e-3}
"""Relative deviation, by the Euclidean norm of a tensor, that rounding explains: sums of a few hundred float32
products in another order (2^-24 each), and a few roundings to bf16 (2^-9) and fp16 (2^-12)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What is run in both ways."""

    build: Callable[[], nn.Module]
    loss_fn: Callable[[Any, Batch], Any]
    micro_batch: Callable[[int], Batch]
    """The micro-batch of a number: step * (ranks * accumulation) + place in the step."""
    optimizer: Callable[[nn.Module], Optimizer]
    steps: int = 3
    accumulation: int = 1
    """Micro-batches of a rank in a step."""
    clip_norm: float | None = 1.0
    seed: int = 0
    keep_gradients: bool = True
    """Compare gradients too; without them, losses, norms and parameters."""
    only_last: bool = False
    """Compare the parameters of the last step only."""


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
    """The largest deviation of all."""
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

CONCATENATED_SLACK = {"fp32": 4.0, "bf16": 4.0, "fp16": 8.0}
"""Where one process takes the micro-batches of all ranks as one, it rounds the gradient of their sum once, and the
ranks round each of theirs; Adam then makes steps of full size out of what differs in small gradients. In fp16 a bias
near zero was seen to be off by 2 % after 20 steps, the same at every ZeRO stage."""


def verify(case: Case, plan: Plan, nproc: int) -> Verdict:
    """Run `case` in this process and under `plan` on `nproc` processes, and compare.

    The parts of `case` must be functions with a name of their own, or the processes cannot find them.
    """
    from trainfleet.training.launch import launch

    together, remarks = reference_case(case, plan.data_ranks(nproc))
    if remarks and plan.precision == "fp16":
        # One process would sum the gradients of all ranks in fp16, and overflow where they do not.
        plan = replace(plan, loss_scale=LossScale(initial=min(plan.loss_scale.initial, 1024.0)))
    alone = Plan(precision=plan.precision, loss_scale=plan.loss_scale, microbatches=plan.microbatches)
    with Mesh.from_env(alone) as mesh:
        reference = trace(together, alone, mesh)
    case = replace(case, build=together.build)
    found = launch(_trace_rank, nproc, (case, plan))[0]
    if found is None:
        raise RankFailed("Rank 0 returned no trace to compare.")
    return compare(
        reference, found, plan.precision, slack=CONCATENATED_SLACK[plan.precision] if remarks else 1.0, remarks=remarks
    )


def _trace_rank(case: Case, plan: Plan) -> Trace | None:
    with Mesh.from_env(plan) as mesh:
        found = trace(case, plan, mesh)
        return found if mesh.is_main else None


def reference_case(case: Case, ranks: int) -> tuple[Case, tuple[str, ...]]:
    """The same work for one process, and remarks on what had to be changed to compare.

    Where batch statistics are synchronised, one process must see the batch that all ranks see together.
    """
    if not _has_batch_statistics(case.build()):
        return replace(case, accumulation=case.accumulation * ranks), ()
    remark = (
        "The model has batch statistics: one process takes the micro-batches of all ranks as one. "
        "Dropout would not be comparable then and is switched off."
    )
    plain = replace(case, build=_WithoutDropout(case.build), micro_batch=_Concatenated(case.micro_batch, ranks))
    return plain, (remark,)


@dataclass(frozen=True, slots=True)
class _Concatenated:
    micro_batch: Callable[[int], Batch]
    ranks: int

    def __call__(self, number: int) -> Batch:
        import torch

        parts = [self.micro_batch(number * self.ranks + rank) for rank in range(self.ranks)]
        columns = iter([torch.cat(column) for column in zip(*(arrays(part) for part in parts))])
        return map_arrays(lambda _: next(columns), parts[0])


@dataclass(frozen=True, slots=True)
class _WithoutDropout:
    build: Callable[[], nn.Module]

    def __call__(self) -> nn.Module:
        from torch.nn.modules.dropout import _DropoutNd

        model = self.build()
        for module in model.modules():
            if isinstance(module, _DropoutNd):
                module.p = 0.0
        return model


def _has_batch_statistics(model: nn.Module) -> bool:
    from torch.nn.modules.batchnorm import _BatchNorm

    return any(isinstance(module, _BatchNorm) for module in model.modules())


def trace(case: Case, plan: Plan, mesh: Mesh) -> Trace:
    """Run `case` under `plan` on the ranks of `mesh`; what was computed, gathered whole, on every rank."""
    import torch

    from trainfleet.parallel import make_engine, parallelize

    torch.manual_seed(case.seed)
    model = parallelize(case.build(), mesh, plan, example=case.micro_batch(0))
    engine = make_engine(model, case.optimizer(model), case.loss_fn, seed=case.seed)
    found: Trace = {}
    ranks = mesh.data_axes.size
    for step in range(case.steps):
        first = step * ranks * case.accumulation
        numbers = [first + i * ranks + mesh.data_axes.rank for i in range(case.accumulation)]
        loss = engine.forward_backward([case.micro_batch(number) for number in numbers])
        found[f"step {step + 1}, loss"] = np.asarray(loss.mean)
        if case.keep_gradients:
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    found[f"step {step + 1}, gradient of {name}"] = _whole(parameter.grad)
        found[f"step {step + 1}, gradient norm"] = np.asarray(engine.clip(case.clip_norm))
        engine.step()
        if not case.only_last or step == case.steps - 1:
            for name, parameter in model.named_parameters():
                found[f"step {step + 1}, parameter {name}"] = _whole(parameter)
            for name, buffer in model.named_buffers():
                found[f"step {step + 1}, buffer {name}"] = _whole(buffer)
    return found


def _whole(tensor: Tensor) -> NDArray[Any]:
    import torch
    from torch.distributed.tensor import DTensor

    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    copied = whole.detach().to("cpu", copy=True)
    # NumPy has no bfloat16.
    return (copied.float() if copied.dtype == torch.bfloat16 else copied).numpy()  # type: ignore[no-any-return]


def compare(
    reference: Trace, found: Trace, precision: str, *, slack: float = 1.0, remarks: Sequence[str] = ()
) -> Verdict:
    """Compare traces; a tensor that only one of them has deviates without bound.

    `slack` multiplies the tolerance. A tensor that is not finite agrees where the same elements are not finite: fp16
    overflows, and skips, alike. Elements of parameters whose gradient is rounding alone (NOISE) are not compared.
    """
    tolerance = TOLERANCE[precision] * slack
    usual = _usual_gradients(reference)
    noise = _noise(reference, usual, NOISE[precision])
    differences = []
    for name in [*reference, *(name for name in found if name not in reference)]:
        step, _, what = name.partition(", ")
        floor = SMALL * usual.get(step, 0.0) if what.startswith("gradient of ") else 0.0
        aside = noise.get(what.removeprefix("parameter ")) if what.startswith("parameter ") else None
        deviation = _deviation(found.get(name), reference.get(name), floor=floor, aside=aside)
        differences.append(Difference(tensor=name, deviation=deviation, tolerance=tolerance))
    return Verdict(
        compared=len(differences),
        first=next((difference for difference in differences if not difference.explained), None),
        largest=max(differences, key=lambda difference: difference.deviation),
        remarks=(*remarks, *_said_of(noise)),
    )


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


def _noise(reference: Trace, usual: Mapping[str, float], share: float) -> dict[str, NDArray[Any]]:
    """By parameter, the elements that in some step had a gradient, but only of rounding; without those of none."""
    found: dict[str, NDArray[Any]] = {}
    for name, value in reference.items():
        step, _, what = name.partition(", ")
        if what.startswith("gradient of "):
            size = np.abs(value)
            parameter = what.removeprefix("gradient of ")
            here = (size > 0) & (size < share * usual[step])
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
