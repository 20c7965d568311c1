"""trace: everything that a few steps compute, gathered whole, by name and in the order of computation."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from trainfleet.mesh import Mesh
from trainfleet.plan import MODEL_AXES, Plan
from trainfleet.training.proof.activations import Activations, whole_of
from trainfleet.training.proof.case import Case
from trainfleet.training.proof.verdict import TOLERANCE, Trace, is_activation

if TYPE_CHECKING:
    from torch import Tensor, nn

    from trainfleet.parallel import Engine
    from trainfleet.parallel.choices import Choices, Kind, Ties


@runtime_checkable
class Gathering(Protocol):
    """An engine that keeps gradients and parameters in a form of its own, and gathers them when asked."""

    def gradients(self) -> dict[str, Tensor]: ...

    def parameters(self) -> dict[str, Tensor]: ...


def trace_rank(case: Case, plan: Plan, ties: Mapping[Kind, Ties]) -> Trace:
    """What this rank has to tell: of what several ranks have alike, the first of them.

    Where rounding could decide, it chooses as `ties` tell.
    """
    from trainfleet.parallel.choices import taking

    with Mesh.from_env(plan) as mesh:
        found = trace(case, plan, mesh, taking(TOLERANCE[plan.precision], ties))
        is_first = {axis: mesh[axis].rank == 0 for axis in mesh.plan_axes if axis != "pp"}
        if all(is_first.values()):
            return found
        of_model = all(is_first.get(axis, True) for axis in MODEL_AXES)
        return {name: value for name, value in found.items() if is_activation(name)} if of_model else {}


def trace(case: Case, plan: Plan, mesh: Mesh, choices: Choices | None = None) -> Trace:
    """Run `case` under `plan` on the ranks of `mesh`; what was computed, gathered whole, on every rank that has it.

    Activations are those of this rank's own micro-batches; under a pipeline, tensors those of its own stages.
    `choices` is entered where the model computes.
    """
    import torch

    from trainfleet.parallel import make_engine, parallelize

    torch.manual_seed(case.seed)
    model = parallelize(case.build(), mesh, plan, example=case.micro_batch(0))
    engine = make_engine(model, case.optimizer(model), case.loss_fn, prepare=case.prepare, seed=case.seed)
    found: Trace = {}
    ranks = mesh.data_axes.size
    for step in range(case.steps):
        first = step * ranks * case.accumulation
        numbers = [first + i * ranks + mesh.data_axes.rank for i in range(case.accumulation)]
        watched = Activations(model) if case.keep_activations and step == 0 else nullcontext()
        if choices is not None:
            choices.step = step
        with watched, choices or nullcontext():
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


def shake_gradients(model: nn.Module, part: float) -> None:
    """Change each gradient by noise of `part` of its root mean square; torch's generator is left as it was."""
    import torch

    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.grad is not None:
                size = parameter.grad.abs().square().mean().sqrt()
                parameter.grad += torch.randn_like(parameter.grad) * (part * size)
