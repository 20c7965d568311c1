"""Engine: runs a spread model, one step at a time. The Trainer drives it and knows no kind.

A step is: micro-batches forward and backward, the gradient of sum(total) / sum(weight) over all of them on all
ranks, its norm and clipping, the update. Where fp16 overflows, every rank skips the update, for all of them look
at the same norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainfleet.batch import Batch, call_with_batch, cut_batch, to_device
from trainfleet.comm.group import Work
from trainfleet.errors import DataError, PlanError
from trainfleet.loss import LossSum
from trainfleet.mesh import Mesh
from trainfleet.parallel.arrival import Arrival, Prepare
from trainfleet.parallel.clip import gradient_norm, scale_gradients_
from trainfleet.parallel.lockstep import Lockstep
from trainfleet.parallel.loss_scale import LossScaler
from trainfleet.parallel.offload import StateOffload
from trainfleet.parallel.optimizers import TABLE, Standing, check_optimizer, shard_safe
from trainfleet.parallel.out_of_memory import phase
from trainfleet.parallel.pieces import ModelState, OptimizerState
from trainfleet.parallel.precision import raise_to_float32, refuse_narrow_state, watch_dtypes
from trainfleet.parallel.randomness import number_in_step, seed_micro_batch
from trainfleet.parallel.same_batch import refuse_unlike_batches
from trainfleet.parallel.spread import Spread, spread_of
from trainfleet.parallel.usage import Usage
from trainfleet.plan import Plan
from trainfleet.state import Setting, Stateful
from trainfleet.stopwatch import timed

LossFunction = Callable[[Any, Batch], Any]
"""(output, batch) -> LossSum, or a scalar tensor where all micro-batches are equal."""


class Engine(Protocol):
    """Runs a spread model. Every method is a collective: all ranks call it, in the same order."""

    model: nn.Module
    plan: Plan

    def forward_backward(self, micro_batches: Sequence[Batch]) -> LossSum:
        """Leave the step's gradient in the parameters; the loss sum of all ranks, as floats."""
        ...

    def clip(self, max_norm: float | None) -> float:
        """The gradient's norm before clipping to `max_norm` (None: only measure)."""
        ...

    def step(self) -> bool:
        """Update the parameters and forget the gradients. False where an overflow forbade the update."""
        ...

    def skip(self) -> bool:
        """Forget the gradients, and leave the parameters as they are; the step counts. False, as of `step`."""
        ...

    def evaluate(self, batches: Iterable[Batch]) -> LossSum:
        """The loss sum over the batches of all ranks, without gradients; equally many batches on each."""
        ...

    def state(self) -> dict[str, Stateful]:
        """What a checkpoint must hold for this engine to go on as if nothing had happened."""
        ...


class NativeEngine:
    """The engine of models spread by `parallelize`: replicated or sharded, in any precision.

    `loss_fn(output, batch)` gets what `forward(model, batch)` returned, in float32. `prepare(batch)` is called first,
    on the device (see `Arrival`). With `seed`, random numbers of the model are a function of (seed, step,
    micro-batch); with None, torch's generators are left alone. The first step is held against the table of `precision`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loss_fn: LossFunction,
        *,
        forward: Callable[[nn.Module, Batch], Any] | None = None,
        prepare: Prepare | None = None,
        seed: int | None = 0,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.spread = spread_of(model)
        self.plan = self.spread.plan
        self.mesh: Mesh = self.spread.mesh
        self.steps = 0
        """Steps taken, skipped ones included: what random numbers depend on."""
        self.spread.rest()
        check_optimizer(shard_safe(optimizer), self.plan)
        refuse_optimizer(optimizer, model)
        self.loss_fn = loss_fn
        self._forward = forward or call_with_batch
        self._seed = seed
        self._arrive = Arrival(prepare, self.mesh, self.plan, seed)
        self._usage = Usage(model, self.spread.sharded)
        self._lockstep = Lockstep(model, self.mesh.data_axes)
        self._scaler = LossScaler(self.plan.loss_scale) if self.plan.precision == "fp16" else None
        self._norm: Tensor | None = None
        self._has_gradients = False
        self._is_checked = False
        self._divisor: float | None = None
        """What each rank divides its totals by before backward. It keeps gradients in range, and spares a pass over
        them while steps are equally heavy; it changes no result, for the true weight is known in the end."""
        if self.plan.offload == "optimizer":
            StateOffload(optimizer)

    @property
    def loss_scale(self) -> float | None:
        """The scale of fp16 now; None in other precisions."""
        return self._scaler.scale if self._scaler else None

    def forward_backward(self, micro_batches: Sequence[Batch]) -> LossSum:
        with timed("backward"), self.spread.watched():  # whatever is not forward, transfer or communication
            return self._forward_backward(parts_of(micro_batches, self.plan))

    def _forward_backward(self, micro_batches: Sequence[Batch]) -> LossSum:
        if not self.model.training:  # walking through all modules costs 0.1 ms
            self.model.train()
        self._usage.start()
        self._lockstep.start()
        if self._has_gradients:  # no step took them: an error came between, or nobody wanted them
            self._clear_gradients()
        self._has_gradients = True
        self._norm = None
        if self._is_checked:
            return self._run(micro_batches)
        refuse_unlike_batches(micro_batches, self.mesh)
        with first_step(self.model, self.spread):
            return self._run(micro_batches)

    def _run(self, micro_batches: Sequence[Batch]) -> LossSum:
        device = self.mesh.device
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        scale = self.loss_scale or 1.0
        for i, batch in enumerate(micro_batches):
            with self.spread.micro_batch(last=i == len(micro_batches) - 1):
                with phase("forward", self.model, self.optimizer):
                    here = self._arrive(batch, self.steps, i)
                    if self._seed is not None:
                        number = number_in_step(i, self.plan.microbatches, self.mesh.data_axes)
                        seed_micro_batch(self._seed, self.steps, number)
                    loss = self._loss(here)
                self._usage.watch()
                sums += as_numbers(loss, device)
                if self._divisor is None:
                    self._divisor = self._agree_on_divisor(sums[1].item(), len(micro_batches))
                with phase("backward", self.model, self.optimizer):
                    (loss.total * (scale / self._divisor)).backward()
                if i == len(micro_batches) - 1:
                    message, work = self._begin_sum_over_ranks(sums)
        work.wait()
        total, weight, ways, squares, *used = message.tolist()
        self._lockstep.check(ways, squares)
        self._drop_unused(used)
        self._finish_gradients(weight, scale)
        return LossSum(total, weight)

    def _loss(self, batch: Batch) -> LossSum:
        context = self.spread.context
        if context is None:
            split = self.spread.split
            loss = self._compute(batch) if split is None else split.compute(self._compute, batch)
        else:
            loss = context.run(self._compute, batch, strict=self.model.training)
        self._lockstep.end_forward()
        return checked_loss(loss)

    def _compute(self, batch: Batch) -> Any:
        output = self._forward(self.model, batch)
        if self.plan.precision != "fp32":
            output = raise_to_float32(output)  # the model does so too, unless `forward` calls but a part of it
        if self.plan.devices:
            batch = to_device(batch, self.plan.devices[-1])  # where the output is
        return self.loss_fn(output, batch)

    def _agree_on_divisor(self, first_weight: float, num_micro_batches: int) -> float:
        """As if every micro-batch of every step weighed what the very first one does.

        That is the same for any number of ranks. The mean over ranks is taken later, so each divides by its share;
        not under fp16, where a rank's gradients must overflow exactly where those of one process would.
        """
        first = torch.tensor([first_weight], dtype=torch.float64, device=self.mesh.device)
        self.mesh.world.broadcast_(first).wait()
        shares = 1 if self._scaler else self.mesh.data_axes.size
        return (first.item() or 1.0) * num_micro_batches * self.mesh.data_axes.size / shares

    def _begin_sum_over_ranks(self, sums: Tensor) -> tuple[Tensor, Work]:
        """[total, weight, two of lockstep, how many ranks used each parameter], while gradients are under way."""
        self.spread.average.send()  # on all ranks first, also on one whose backward reached nothing
        message = torch.cat([sums, sums.new_tensor(self._lockstep.numbers()), self._usage.bits(sums.device)])
        return message, self.mesh.data_axes.all_reduce_(message)

    def _drop_unused(self, used: list[float]) -> None:
        """Given how many ranks that see different data used each parameter here."""
        if self.plan.ep > 1 and self.plan.cp > 1:  # those of other positions hold other experts
            counts = torch.tensor(used, dtype=torch.float64, device=self.mesh.device)
            self.mesh["cp"].all_reduce_(counts).wait()
            used = counts.tolist()
        self._usage.drop_unused(used)

    def _finish_gradients(self, weight: float, scale: float) -> None:
        # Ranks have averaged the gradients of total * scale / divisor; the step's is that of sum(total) / sum(weight).
        assert self._divisor is not None
        if weight == 0:
            raise DataError("All micro-batches of this step have weight 0, so there is no gradient to take.")
        factor = self.mesh.data_axes.size * self._divisor / (scale * weight)
        scale_gradients_(self._usage.parameters, factor)

    def clip(self, max_norm: float | None) -> float:
        with timed("optimizer"):
            self._norm = self._measure_norm()
            norm = float(self._norm)
            if max_norm is not None and norm > max_norm and norm != float("inf"):
                scale_gradients_(self._usage.parameters, max_norm / norm)
            return norm

    def _measure_norm(self) -> Tensor:
        tensor_group = self.mesh["tp"] if self.plan.tp > 1 else None
        expert_group = self.mesh["ep"] if self.plan.ep > 1 else None
        return gradient_norm(self._usage.parameters, self.mesh.shard_axes, tensor_group, expert_group)

    def step(self) -> bool:
        with phase("optimizer", self.model, self.optimizer):
            return self._step()

    def _step(self) -> bool:
        if self._scaler is not None:
            norm = self._norm if self._norm is not None else self._measure_norm()
            overflow = not bool(torch.isfinite(norm))
            self._scaler.update(overflow=overflow)
        else:
            overflow = False
        if not overflow:
            self.optimizer.step()
            if not self._is_checked:
                refuse_narrow_state(self.model.named_parameters(), self.optimizer)
                self._is_checked = True
                self._lockstep.asks = False
        self._clear_gradients()
        self.steps += 1
        return not overflow

    def skip(self) -> bool:
        self._clear_gradients()
        self.steps += 1
        return False

    def _clear_gradients(self) -> None:
        for parameter in self._usage.parameters:
            parameter.grad = None
        self._has_gradients = False

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> LossSum:
        sums = torch.zeros(2, dtype=torch.float64, device=self.mesh.device)
        with phase("evaluation", self.model, self.optimizer), evaluating(self.model):
            for batch in batches:
                sums += as_numbers(self._loss(self._arrive.for_evaluation(batch)), self.mesh.device)
        self.spread.rest()
        self.mesh.data_axes.all_reduce_(sums).wait()
        total, weight = sums.tolist()
        return LossSum(total, weight)

    def state(self) -> dict[str, Stateful]:
        self.spread.rest()
        return {
            "model": ModelState(self.model),
            "optimizer": OptimizerState(self.model, self.optimizer),
            "engine": _Counters(self),
        }


class _Counters:
    """Stateful: the engine's own few numbers, and the precision that they were found with."""

    def __init__(self, engine: NativeEngine) -> None:
        self._engine = engine

    def state_dict(self) -> dict[str, Any]:
        scaler = self._engine._scaler
        return {
            "steps": self._engine.steps,
            "step_divisor": self._step_divisor(),
            "precision": Setting(self._engine.plan.precision),
            "loss_scale": scaler.state_dict() if scaler else None,
        }

    def _step_divisor(self) -> float | None:
        """The divisor of a whole step, which does not depend on the number of ranks."""
        divisor = self._engine._divisor
        return None if divisor is None else divisor * self._shares()

    def _shares(self) -> int:
        return 1 if self._engine._scaler else self._engine.mesh.data_axes.size

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        self._engine.steps = int(state["steps"])
        divisor = state["step_divisor"]
        self._engine._divisor = None if divisor is None else float(divisor) / self._shares()
        if self._engine._scaler is not None and state["loss_scale"] is not None:
            self._engine._scaler.load_state_dict(state["loss_scale"])


def parts_of(micro_batches: Sequence[Batch], plan: Plan) -> Sequence[Batch]:
    """The micro-batches of a step as they are run, cut as plan.microbatches says; DataError where there are none."""
    if not micro_batches:
        raise DataError("A step needs at least one micro-batch on every rank; this one got none.")
    if plan.microbatches == 1:
        return micro_batches
    return [part for batch in micro_batches for part in cut_batch(batch, plan.microbatches)]


@contextmanager
def first_step(model: nn.Module, spread: Spread) -> Iterator[None]:
    """Around the first forwards and backwards: holds dtypes against the table of precisions, and settles a budget.

    PlanError on all ranks where one finds something: they may have used different modules.
    """
    with watch_dtypes(model, spread.plan, torch.device(spread.mesh.device).type) as found:
        yield
    if spread.budget is not None:
        spread.budget.settle(spread.mesh.world)
    if reasons := [each[0] for each in spread.mesh.world.exchange(found[:1]) if each]:
        raise PlanError(reasons[0])


def refuse_optimizer(optimizer: Optimizer, model: nn.Module) -> None:
    """PlanError for an optimizer that no engine can step, or that holds other tensors than the model's."""
    name = type(optimizer).__name__
    for part in getattr(optimizer, "parts", (optimizer,)):
        if TABLE.get(type(part), Standing()).needs_closure:
            raise PlanError(
                f"{type(part).__name__} computes the loss several times in a step, which the engine does not let it. "
                "Use AdamW, or write the loop by hand."
            )
    known = set(model.parameters())
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if strangers := sum(parameter not in known for parameter in held):
        raise PlanError(
            f"{strangers} of the {len(held)} tensors that {name} holds are no parameters of the spread model: it was "
            "made before `parallelize`, which replaces them, or for another model. Make it afterwards, "
            "from model.parameters()."
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in its evaluation mode; afterwards each as it was, for some may be frozen there."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def checked_loss(value: Any) -> LossSum:
    """What a loss function returned, in float32 or wider; DataError where it is no loss."""
    loss = LossSum.of(value)
    if not isinstance(loss.total, Tensor) or loss.total.numel() != 1:
        shape = tuple(loss.total.shape) if isinstance(loss.total, Tensor) else type(loss.total).__name__
        raise DataError(f"The loss function returned {shape}; it must return a scalar tensor or a LossSum of one.")
    return LossSum(loss.total.float() if loss.total.dtype != torch.float64 else loss.total, loss.weight)


def as_numbers(loss: LossSum, device: str) -> Tensor:
    """[total, weight] of a micro-batch, float64, without a graph."""
    weight = loss.weight if isinstance(loss.weight, Tensor) else torch.tensor(float(loss.weight), device=device)
    return torch.stack([each.detach().to(device).double().reshape(()) for each in (loss.total, weight)])
