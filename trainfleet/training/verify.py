"""verify: does a plan compute what one process computes? Compared tensor by tensor, in the order of computation.

One process takes the micro-batches of all ranks one after the other; the ranks take their shares. What modules give in
the first step, and losses, gradient norms, gradients and parameters of each step are gathered and compared, and the
first that differs is named.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from trainfleet.batch import Batch, arrays, map_arrays
from trainfleet.errors import DataError
from trainfleet.mesh import Mesh
from trainfleet.plan import MODEL_AXES, LossScale, Plan
from trainfleet.training.activations import Activations, whole_of
from trainfleet.training.verdict import CONCATENATED_SLACK, TOLERANCE, Trace, Verdict, compare, is_activation, joined

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from trainfleet.parallel import Engine


@runtime_checkable
class Gathering(Protocol):
    """An engine that keeps gradients and parameters in a form of its own, and gathers them when asked."""

    def gradients(self) -> dict[str, Tensor]: ...

    def parameters(self) -> dict[str, Tensor]: ...


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
    keep_activations: bool = False
    """Compare what each module gave in the first step, too."""
    shake: float = 0.0
    """By what part of their size gradients are changed at random before each step."""
    only_last: bool = False
    """Compare the parameters of the last step only."""


def verify(
    model: nn.Module | Callable[[], nn.Module],
    plan: Plan,
    batches: Sequence[Batch],
    *,
    loss_fn: Callable[[Any, Batch], Any] | str = "model",
    optimizer: Callable[[nn.Module], Optimizer] | None = None,
    nproc: int | None = None,
    accumulation: int = 1,
    clip_norm: float | None = 1.0,
    seed: int = 0,
) -> Verdict:
    """Does `plan` compute for `model` what one process computes? For test suites: `assert verdict.holds, verdict`.

    `batches` are micro-batches; each step takes `accumulation` of them for every rank that sees different data, and
    there are as many steps as they suffice for. `loss_fn` is (output, batch) -> loss, or a name as in a recipe;
    `model` is the loss that the model computes itself. `optimizer` makes one for a model: AdamW with a rate of 1e-3
    if none is given. The plan runs on `nproc` real processes, or as few as it needs, at least two.
    DataError where the batches do not suffice for one step; what a rank raised, where it fails under the plan.
    """
    from trainfleet.training.losses import loss_by_name

    nproc = nproc or plan.fewest_ranks()
    ranks = plan.data_ranks(nproc)
    steps, left = divmod(len(batches), ranks * accumulation)
    if not steps:
        raise DataError(
            f"A step of this plan takes {ranks * accumulation} micro-batches ({accumulation} for each of {ranks} data "
            f"ranks), but {left} are given. Give more batches."
        )
    case = Case(
        build=_Copied(model),
        loss_fn=loss_by_name(loss_fn) if isinstance(loss_fn, str) else loss_fn,
        micro_batch=_Listed(tuple(batches)),
        optimizer=optimizer or _adamw,
        steps=steps,
        accumulation=accumulation,
        clip_norm=clip_norm,
        seed=seed,
        keep_activations=True,
    )
    return prove(case, plan, nproc)


@dataclass(frozen=True, slots=True)
class _Copied:
    """A builder that gives a new copy each time, so that no run sees what another made of the model."""

    model: nn.Module | Callable[[], nn.Module]

    def __call__(self) -> nn.Module:
        from torch import nn

        return copy.deepcopy(self.model) if isinstance(self.model, nn.Module) else self.model()


@dataclass(frozen=True, slots=True)
class _Listed:
    batches: tuple[Batch, ...]

    def __call__(self, number: int) -> Batch:
        return self.batches[number]


def _adamw(model: nn.Module) -> Optimizer:
    import torch

    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def prove(case: Case, plan: Plan, nproc: int) -> Verdict:
    """Run `case` in this process and under `plan` on `nproc` processes, and compare.

    The parts of `case` must be functions with a name of their own, or the processes cannot find them.
    """
    from trainfleet.training.launch import launch

    together, remarks = reference_case(case, plan.data_ranks(nproc))
    slack = CONCATENATED_SLACK[plan.precision] if remarks else 1.0
    if remarks and plan.precision == "fp16":
        # One process would sum the gradients of all ranks in fp16, and overflow where they do not.
        plan = replace(plan, loss_scale=LossScale(initial=min(plan.loss_scale.initial, 1024.0)))
    if plan.compile and together.keep_activations:
        together = replace(together, keep_activations=False)
        remarks = (*remarks, "Compiled blocks do not show what is computed inside them: activations are not compared.")
    alone = Plan(precision=plan.precision, loss_scale=plan.loss_scale, microbatches=plan.microbatches)
    with Mesh.from_env(alone) as mesh:
        reference = trace(together, alone, mesh)
        rounded = [trace(each, plan_of_it, mesh) for each, plan_of_it in otherwise_rounded(together, alone)]
    case = replace(case, build=together.build, keep_activations=together.keep_activations)
    found = joined(launch(trace_rank, nproc, (case, plan)))
    return compare(reference, found, plan.precision, slack=slack, rounded=rounded, remarks=remarks)


def trace_rank(case: Case, plan: Plan) -> Trace:
    """What this rank has to tell: of what several ranks have alike, the first of them."""
    with Mesh.from_env(plan) as mesh:
        found = trace(case, plan, mesh)
        is_first = {axis: mesh[axis].rank == 0 for axis in mesh.plan_axes if axis != "pp"}
        if all(is_first.values()):
            return found
        of_model = all(is_first.get(axis, True) for axis in MODEL_AXES)
        return {name: value for name, value in found.items() if is_activation(name)} if of_model else {}


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
    plain = replace(
        case,
        build=_WithoutDropout(case.build),
        micro_batch=_Concatenated(case.micro_batch, ranks),
        keep_activations=False,  # those of another batch
    )
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
    """Run `case` under `plan` on the ranks of `mesh`; what was computed, gathered whole, on every rank that has it.

    Activations are those of this rank's own micro-batches; under a pipeline, tensors those of its own stages.
    """
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
        watched = Activations(model) if case.keep_activations and step == 0 else nullcontext()
        with watched:
            loss = engine.forward_backward([case.micro_batch(number) for number in numbers])
        if isinstance(watched, Activations):
            found |= watched.by_micro_batch(mesh.data_axes, case.accumulation, plan.microbatches)
        found[f"step {step + 1}, loss"] = np.asarray(loss.mean)
        if case.keep_gradients:
            for name, gradient in _gradients(engine).items():
                found[f"step {step + 1}, gradient of {name}"] = whole_of(gradient)
        if case.shake:
            shake_gradients(model, case.shake)
        found[f"step {step + 1}, gradient norm"] = np.asarray(engine.clip(case.clip_norm))
        engine.step()
        if not case.only_last or step == case.steps - 1:
            for name, parameter in _parameters(engine).items():
                found[f"step {step + 1}, parameter {name}"] = whole_of(parameter)
            for name, buffer in model.named_buffers():
                found[f"step {step + 1}, buffer {name}"] = whole_of(buffer)
    return found


def _gradients(engine: Engine) -> dict[str, Tensor]:
    """The step's gradients by name; those of an engine that keeps them elsewhere than in the parameters, from it."""
    if isinstance(engine, Gathering):
        return engine.gradients()
    return {name: p.grad for name, p in engine.model.named_parameters() if p.grad is not None}


def _parameters(engine: Engine) -> dict[str, Tensor]:
    return engine.parameters() if isinstance(engine, Gathering) else dict(engine.model.named_parameters())


def otherwise_rounded(case: Case, alone: Plan) -> list[tuple[Case, Plan]]:
    """The same work of one process, rounded in other ways: they show what rounding does to this very model."""
    shaken = replace(case, shake=TOLERANCE[alone.precision])
    return [(shaken, alone)] + [(case, replace(alone, precision="fp32"))] * (alone.precision != "fp32")


def shake_gradients(model: nn.Module, part: float) -> None:
    """Change each gradient by noise of `part` of its root mean square; torch's generator is left as it was."""
    import torch

    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.grad is not None:
                size = parameter.grad.abs().square().mean().sqrt()
                parameter.grad += torch.randn_like(parameter.grad) * (part * size)
