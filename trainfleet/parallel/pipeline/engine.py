"""PipelineEngine: the Engine of a model whose stages lie on several ranks.

The micro-batches of a step are those of the pipeline. Each stage takes them in rising order, so that gradients are
added as one process adds them; the loss is taken by the rank of the last stage, and told to the others in the end.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from trainfleet.batch import Batch
from trainfleet.loss import LossSum
from trainfleet.parallel.clip import gradient_norm
from trainfleet.parallel.context.handover import Handover
from trainfleet.parallel.engine import NativeEngine, as_numbers, checked_loss, evaluating
from trainfleet.parallel.layout import is_split_over
from trainfleet.parallel.out_of_memory import phase
from trainfleet.parallel.pipeline.flow import Flow, run_forward
from trainfleet.parallel.pipeline.pipe import Pipeline
from trainfleet.parallel.pipeline.schedules import SPLITS, Action, orders
from trainfleet.parallel.pipeline.tied import sum_tied_gradients
from trainfleet.parallel.precision import raise_to_float32
from trainfleet.parallel.randomness import number_in_step, seed_micro_batch

logger = logging.getLogger(__name__)


class PipelineEngine(NativeEngine):
    """Runs the stages of this rank in the order of plan.schedule; see `NativeEngine` for the arguments."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert self.spread.pipeline is not None
        self.pipeline: Pipeline = self.spread.pipeline
        self._orders: dict[int, list[Action]] = {}
        self._splits = self.plan.schedule in SPLITS and self._can_split()
        self._counted = [  # a tied parameter by its first holder
            parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad and self.pipeline.copy_of(name) == 0
        ]

    def _can_split(self) -> bool:
        """Whether backward can be taken in two parts, the first without the gradients of parameters."""
        plan = self.plan
        obstacle = (
            f"plan.zero={plan.zero}"
            if plan.zero
            else f"plan.recompute={plan.recompute!r}"
            if plan.recompute != "none"
            else f"plan.tp={plan.tp}"
            if plan.tp > 1
            else f"plan.cp={plan.cp}"
            if plan.cp > 1
            else f"plan.ep={plan.ep}"
            if plan.ep > 1
            else "plan.compile"
            if plan.compile
            else None
        )
        if obstacle is not None:
            logger.info("Under %s the schedule %s takes each backward whole.", obstacle, plan.schedule)
        return obstacle is None

    def _run(self, micro_batches: Sequence[Batch]) -> LossSum:
        try:
            return self._run_schedule([self._arrive(batch, self.steps, i) for i, batch in enumerate(micro_batches)])
        except BaseException:
            self.spread.forget_step()
            raise

    def _run_schedule(self, batches: list[Batch]) -> LossSum:
        sums = torch.zeros(2, dtype=torch.float64, device=self.mesh.device)
        scale = self.loss_scale or 1.0
        flow = self._flow(batches, seed=self._seed_micro_batch if self._seed is not None else None)
        actions = self._actions(len(batches))
        left = {stage: len(batches) for stage in self.pipeline.held}
        losses: dict[int, Tensor] = {}
        self.spread.average.enabled = False
        for action in actions:
            stage, i = action.stage, action.micro_batch
            if action.kind == "F":
                with phase("forward", self.model, self.optimizer):
                    if stage < self.pipeline.stages.count - 1:
                        flow.forward(stage, i)
                    else:
                        loss = self._loss_of_last(flow, i)
                        sums += as_numbers(loss, self.mesh.device)
                        if self._divisor is None:
                            self._divisor = self._agree_on_divisor(sums[1].item(), len(batches))
                        losses[i] = loss.total * (scale / self._divisor)
                self._lockstep.end_forward()
                self._usage.watch()
            elif action.kind in ("B", "I", "W"):
                with phase("backward", self.model, self.optimizer):
                    self._backward(flow, action, losses, left)
            else:
                flow.exchange(action)
        flow.finish()
        return self._finish_step(sums, scale)

    def _flow(self, batches: Sequence[Batch], seed: Callable[[int], None] | None = None) -> Flow:
        """A pass of micro-batches; DataError, in training, where their sequences are not of a length to be split."""
        programs = [self.pipeline.program(self._forward, batch) for batch in batches]
        context = self.spread.context
        if context is None:
            return Flow(self.pipeline, programs, batches, seed=seed)
        split = [context.split(batch, strict=self.model.training) for batch in batches]
        handovers = [None if length is None else Handover(context, length) for _, length in split]
        return Flow(self.pipeline, programs, [pieces for pieces, _ in split], seed=seed, handovers=handovers)

    def _seed_micro_batch(self, i: int) -> None:
        assert self._seed is not None
        seed_micro_batch(self._seed, self.steps, number_in_step(i, self.plan.microbatches, self.mesh.data_axes))

    def _actions(self, count: int) -> list[Action]:
        if count not in self._orders:
            self._orders[count] = orders(self.plan, count)[self.pipeline.group.rank]
        return self._orders[count]

    def _loss_of_last(self, flow: Flow, i: int) -> LossSum:
        """Run the last stage on micro-batch `i`, and the loss; on logits in pieces, if its head leaves them so."""

        def compute(i: int) -> LossSum:
            output = flow.forward(self.pipeline.stages.count - 1, i)
            loss: LossSum = flow.on_pieces(i, functools.partial(self._loss_of, output))
            return loss

        split = self.spread.split
        return compute(i) if split is None else split.compute(compute, i)  # type: ignore[no-any-return]

    def _loss_of(self, output: Any, batch: Batch) -> LossSum:
        if self.plan.precision != "fp32":
            output = raise_to_float32(output)
        return checked_loss(self.loss_fn(output, batch))

    def _backward(self, flow: Flow, action: Action, losses: dict[int, Tensor], left: dict[int, int]) -> None:
        stage, i = action.stage, action.micro_batch
        if action.kind == "W":
            if self._splits:
                flow.backward_of_parameters(stage, i, self._usage.parameters)
            return
        flow.begin_backward(stage, i, losses.pop(i) if stage == self.pipeline.stages.count - 1 else None)
        left[stage] -= 1
        self._exchange_sharded(last_of_stage=left[stage] == 0, last=not any(left.values()))
        if action.kind == "I" and self._splits:
            flow.backward_of_inputs(stage, i, self._usage.parameters)
        else:
            flow.backward(stage, i)

    def _exchange_sharded(self, *, last_of_stage: bool, last: bool) -> None:
        """What `Spread.exchange_gradients` does, for several stages whose last backwards come one after the other."""
        sharded = self.spread.sharded
        if isinstance(sharded, FSDPModule):
            sharded.set_requires_gradient_sync(last_of_stage or self.plan.zero >= 2)
            sharded.set_requires_all_reduce(last_of_stage)
            sharded.set_reshard_after_backward(last or self.plan.zero == 3)
            sharded.set_is_last_backward(last)

    def _finish_step(self, sums: Tensor, scale: float) -> LossSum:
        """Sum over data-parallel ranks, then over stages, what each needs of the others."""
        self.spread.average.expect()
        message, work = self._begin_sum_over_ranks(sums)
        self.spread.average.finish()
        work.wait()
        total, weight, ways, squares, *used = message.tolist()
        self._lockstep.check(ways, squares)
        self._drop_unused(used)
        told = torch.tensor([total, weight, self._divisor or 0.0], dtype=torch.float64, device=self.mesh.device)
        self.pipeline.group.broadcast_(told, source=self.pipeline.last_rank).wait()
        total, weight, self._divisor = told.tolist()
        sum_tied_gradients(self.pipeline, self.model)
        self._finish_gradients(weight, scale)
        return LossSum(total, weight)

    def _agree_on_divisor(self, first_weight: float, num_micro_batches: int) -> float:
        first = torch.tensor([first_weight], dtype=torch.float64, device=self.mesh.device)
        self.mesh.data_axes.broadcast_(first).wait()  # the ranks of the other stages hear of it in the end
        shares = 1 if self._scaler else self.mesh.data_axes.size
        return (first.item() or 1.0) * num_micro_batches * self.mesh.data_axes.size / shares

    def _measure_norm(self) -> Tensor:
        tensor_group = self.mesh["tp"] if self.plan.tp > 1 else None
        # Some stages have no experts; the ranks over which those of a stage are dealt out have equally many.
        expert_group = self.mesh["ep"] if any(is_split_over(each, "ep") for each in self._counted) else None
        norm = gradient_norm(self._counted, self.mesh.shard_axes, tensor_group, expert_group)
        square = norm.square().to(self.mesh.device)
        self.pipeline.group.all_reduce_(square).wait()
        return square.sqrt()

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> LossSum:
        sums = torch.zeros(2, dtype=torch.float64, device=self.mesh.device)
        with phase("evaluation", self.model, self.optimizer), evaluating(self.model):
            pending: list[Batch] = []
            for batch in batches:
                pending.append(self._arrive.for_evaluation(batch))
                if len(pending) == 2 * self.pipeline.stages.count:  # enough to keep all stages at work
                    self._evaluate(pending, sums)
                    pending = []
            if pending:
                self._evaluate(pending, sums)
        self.spread.rest()
        self.mesh.data_axes.all_reduce_(sums).wait()
        self.pipeline.group.broadcast_(sums, source=self.pipeline.last_rank).wait()
        total, weight = sums.tolist()
        return LossSum(total, weight)

    def _evaluate(self, batches: list[Batch], sums: Tensor) -> None:
        flow = self._flow(batches)

        def last(i: int) -> None:
            sums.add_(as_numbers(self._loss_of_last(flow, i), self.mesh.device))

        run_forward(flow, self.pipeline, len(batches), last)
