"""DeepSpeedEngine: the steps of DeepSpeed's ZeRO, with the numbers of one process.

DeepSpeed averages and shards gradients, steps the optimizer on its flat partitions, and gathers parameters. What makes
the numbers is done around it as for every engine: the division by the weight of all ranks, clipping, the loss scale,
the casts of plan.precision, random numbers. Division and clipping reach it as one factor, its own loss scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainfleet.batch import Batch, call_with_batch
from trainfleet.errors import DataError
from trainfleet.loss import LossSum
from trainfleet.mesh import Mesh
from trainfleet.parallel.arrival import Arrival, Prepare
from trainfleet.parallel.clip import gradient_norm, norm_of_pieces, scale_gradients_
from trainfleet.parallel.deepspeed import library
from trainfleet.parallel.deepspeed.config import settings
from trainfleet.parallel.deepspeed.fragments import fragments, gradient_pieces, shape_of, whole
from trainfleet.parallel.deepspeed.state import Counters, NamedModel, PartitionedModel, PartitionedOptimizer
from trainfleet.parallel.deepspeed.use import Use, refuse_for_deepspeed, said_of_stage_3
from trainfleet.parallel.engine import (
    LossFunction,
    as_numbers,
    checked_loss,
    evaluating,
    first_step,
    parts_of,
    refuse_optimizer,
)
from trainfleet.parallel.loss_scale import LossScaler
from trainfleet.parallel.out_of_memory import phase
from trainfleet.parallel.pieces import OptimizerState
from trainfleet.parallel.precision import raise_to_float32
from trainfleet.parallel.randomness import number_in_step, seed_micro_batch
from trainfleet.parallel.spread import spread_of
from trainfleet.plan import Plan
from trainfleet.state import Stateful
from trainfleet.stopwatch import timed


class DeepSpeedEngine:
    """The engine of a model that `parallelize` prepared for plan.engine=deepspeed; arguments are NativeEngine's.

    Gradients are DeepSpeed's: they do not stand in `parameter.grad`; `gradients` gathers them. Where one is not finite
    its stages 1 to 3 skip the step, in every precision, and so `step` returns False.
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
        self.plan: Plan = self.spread.plan
        self.mesh: Mesh = self.spread.mesh
        self.steps = 0
        """Steps taken, skipped ones included: what random numbers depend on."""
        refuse_optimizer(optimizer, model)
        refuse_for_deepspeed(model, optimizer, self.plan, self.mesh.world_size)
        self.loss_fn = loss_fn
        self._forward = forward or call_with_batch
        self._seed = seed
        self._arrive = Arrival(prepare, self.mesh, self.plan, seed)
        self._names = NamedModel(model, optimizer)
        self._use = Use(model)
        self.scaler = LossScaler(self.plan.loss_scale) if self.plan.precision == "fp16" else None
        self.divisor: float | None = None
        """What each rank divides its totals by before backward, to keep gradients in range; it changes no result."""
        num_elements = sum(parameter.numel() for parameter in model.parameters())
        self._deepspeed = library.initialize(model, optimizer, settings(self.plan, num_elements), self.mesh)
        self._zero = self._deepspeed.optimizer if self.plan.zero else None
        self._fragments = fragments(self._zero, self.plan.zero, self.mesh.data_axes) if self._zero else {}
        self._factor = 1.0
        """What the gradients that DeepSpeed holds have to be multiplied by."""
        self._norm: float | None = None
        self._has_gradients = False
        self._is_checked = False

    @property
    def loss_scale(self) -> float | None:
        """The scale of fp16 now; None in other precisions."""
        return self.scaler.scale if self.scaler else None

    def forward_backward(self, micro_batches: Sequence[Batch]) -> LossSum:
        with timed("backward"):  # whatever is not forward, transfer or communication
            return self._forward_backward(parts_of(micro_batches, self.plan))

    def _forward_backward(self, micro_batches: Sequence[Batch]) -> LossSum:
        if not self.model.training:
            self.model.train()
        if self._has_gradients:  # no step took them: an error came between, or nobody wanted them
            self._forget_gradients()
        self._has_gradients = True
        self._norm = None
        if self._is_checked:
            return self._run(micro_batches)
        with first_step(self.model, self.spread):
            return self._run(micro_batches)

    def _run(self, micro_batches: Sequence[Batch]) -> LossSum:
        device, group = self.mesh.device, self.mesh.data_axes
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        scale = self.loss_scale or 1.0
        self._use.start()
        for i, batch in enumerate(micro_batches):
            here = self._arrive(batch, self.steps, i)
            if self._seed is not None:
                seed_micro_batch(self._seed, self.steps, number_in_step(i, self.plan.microbatches, self.mesh.data_axes))
            self._deepspeed.set_gradient_accumulation_boundary(i == len(micro_batches) - 1)
            with phase("forward", self.model, self.optimizer), said_of_stage_3(self.plan):
                loss = self._loss(self._deepspeed, here)
            sums += as_numbers(loss, device)
            if self.divisor is None:
                self.divisor = self._agree_on_divisor(sums[1].item(), len(micro_batches))
            with phase("backward", self.model, self.optimizer), library.linear_layers(self._deepspeed):
                self._deepspeed.backward(loss.total * (scale / self.divisor), scale_wrt_gas=False)
        message = torch.cat([sums, self._use.counts(device)])
        group.all_reduce_(message).wait()
        total, weight, *counts = message.tolist()
        if weight == 0:
            raise DataError("All micro-batches of this step have weight 0, so there is no gradient to take.")
        assert self.divisor is not None
        self._factor = group.size * self.divisor / (scale * weight)
        if self._zero is None:
            self._use.drop_unused(counts)
            scale_gradients_(self._use.parameters, self._factor)
            self._factor = 1.0
        else:
            self._use.refuse_uneven(counts, len(micro_batches) * group.size)
        return LossSum(total, weight)

    def _loss(self, module: nn.Module, batch: Batch) -> LossSum:
        with library.linear_layers(self._deepspeed):
            output = self._forward(module, batch)
            if self.plan.precision != "fp32":
                output = raise_to_float32(output)
            return checked_loss(self.loss_fn(output, batch))

    def _agree_on_divisor(self, weight: float, num_micro_batches: int) -> float:
        """The weight of a first micro-batch, rank 0's, times their number: as for the engine of our own."""
        first = torch.tensor([weight], dtype=torch.float64, device=self.mesh.device)
        self.mesh.world.broadcast_(first).wait()
        shares = 1 if self.scaler else self.mesh.data_axes.size
        return (first.item() or 1.0) * num_micro_batches * self.mesh.data_axes.size / shares

    def clip(self, max_norm: float | None) -> float:
        with timed("optimizer"):
            return self._clip(max_norm)

    def _clip(self, max_norm: float | None) -> float:
        if self._zero is None:
            self._norm = float(gradient_norm(self._use.parameters, self.mesh["dp_shard"]))
        else:
            pieces = [piece for each in gradient_pieces(self._zero, self.plan.zero).values() for piece in each]
            self._norm = abs(self._factor) * float(norm_of_pieces(pieces, self.mesh.data_axes))
        norm = self._norm
        if max_norm is not None and norm > max_norm and norm != float("inf"):
            if self._zero is None:
                scale_gradients_(self._use.parameters, max_norm / norm)
            else:
                self._factor *= max_norm / norm
        return norm

    def step(self) -> bool:
        with phase("optimizer", self.model, self.optimizer):
            return self._step()

    def _step(self) -> bool:
        if self.scaler is not None:
            norm = self._norm if self._norm is not None else self.clip(None)
            overflow = not torch.isfinite(torch.tensor(norm)).item()
            self.scaler.update(overflow=overflow)
            if overflow:
                return self.skip()
        updated = self._step_of_deepspeed()
        self._is_checked = True
        self._has_gradients = False
        self.steps += 1
        return updated

    def skip(self) -> bool:
        self._forget_gradients()
        self.steps += 1
        return False

    def _step_of_deepspeed(self) -> bool:
        if self._zero is None:
            self._deepspeed.step()
            return True
        self._zero.loss_scale = 1.0 / self._factor
        try:
            self._deepspeed.step()
        finally:
            self._zero.loss_scale = 1.0
        return not self._zero.overflow

    def _forget_gradients(self) -> None:
        """Drop what backwards have left with DeepSpeed, as it does itself where it skips a step."""
        self._has_gradients = False
        if self._zero is None:
            self._deepspeed.zero_grad()
            return
        self._zero.zero_grad(set_to_none=True)
        if self.plan.zero == 3:
            self._zero._pre_step()
            if not self._zero.offload_optimizer:
                self._zero.averaged_gradients = {}
            return
        self._zero.micro_step_id = -1
        if self._zero.cpu_offload:
            self._zero.reset_cpu_buffers()
        self._zero._release_preflattened_grad_buffers()
        for number in self._zero.averaged_gradients:
            self._zero.averaged_gradients[number] = None
            self._zero.all_grad_tensors[number] = None

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> LossSum:
        sums = torch.zeros(2, dtype=torch.float64, device=self.mesh.device)
        with phase("evaluation", self.model, self.optimizer), evaluating(self.model):
            for batch in batches:
                sums += as_numbers(self._loss(self.model, self._arrive.for_evaluation(batch)), self.mesh.device)
        self.mesh.data_axes.all_reduce_(sums).wait()
        total, weight = sums.tolist()
        return LossSum(total, weight)

    def state(self) -> dict[str, Stateful]:
        optimizer: Stateful
        if self._zero is None:
            optimizer = OptimizerState(self.model, self.optimizer)
        else:
            optimizer = PartitionedOptimizer(self._names, self.optimizer, self._fragments, self.mesh)
        return {
            "model": PartitionedModel(self.model, self.plan.zero, self._zero, self.mesh),
            "optimizer": optimizer,
            "engine": Counters(self),
        }

    @torch.no_grad()
    def gradients(self) -> dict[str, Tensor]:
        """The step's gradient by parameter, whole, on every rank; a collective, to be asked before `step`."""
        named = [(name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        if self._zero is None:
            return {name: parameter.grad for name, parameter in named if parameter.grad is not None}
        flat = {flat: torch.cat(each) for flat, each in gradient_pieces(self._zero, self.plan.zero).items()}
        found = {}
        for name, parameter in named:
            part = self._fragments.get(parameter)
            piece = None if part is None else part.of(flat[part.flat])
            first = 0 if part is None else part.first
            made = whole(piece, first, shape_of(parameter), torch.float32, self.mesh)
            found[name] = made.mul_(self._factor)
        return found

    @torch.no_grad()
    def parameters(self) -> dict[str, Tensor]:
        """Every parameter by name, whole, on every rank; a collective."""
        found = {}
        for name, parameter in self.model.named_parameters():
            if self.plan.zero == 3:
                with library.gathered(parameter):
                    found[name] = parameter.detach().clone()
            else:
                found[name] = parameter.detach()
        return found
