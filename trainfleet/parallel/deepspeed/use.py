"""What DeepSpeed takes for granted of models and optimizers, held against what they do; refused where it is not so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainfleet.errors import PlanError
from trainfleet.parallel.joined_optimizer import JoinedOptimizer
from trainfleet.parallel.optimizers import TABLE, Standing, check_optimizer
from trainfleet.plan import Plan


class Use:
    """Counts in how many backwards of a step each trained parameter got a gradient on this rank.

    ZeRO's buckets are filled in the order of backward and summed over the ranks as they are: where ranks use different
    parameters, sums of unlike things come out. And it steps flat partitions, so that a parameter without a gradient
    is decayed, or in stage 3 gets the gradient of an earlier step.
    """

    def __init__(self, model: nn.Module) -> None:
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        self._counts = [0.0] * len(named)
        for i, parameter in enumerate(self.parameters):
            parameter.register_post_accumulate_grad_hook(self._note(i))  # type: ignore[no-untyped-call]

    def _note(self, i: int) -> Callable[[Tensor], None]:
        counts = self._counts  # not self: it holds the parameters, and the model would never be freed

        def note(_: Tensor) -> None:
            counts[i] += 1.0

        return note

    def start(self) -> None:
        self._counts[:] = [0.0] * len(self._counts)

    def counts(self, device: str) -> Tensor:
        """One number a parameter, to be summed over the ranks."""
        return torch.tensor(self._counts, dtype=torch.float64, device=device)

    def drop_unused(self, counts: list[float]) -> None:
        """Take away the gradients of parameters that no rank used: averaging has made zeros of them."""
        for parameter, count in zip(self.parameters, counts):
            if count == 0:
                parameter.grad = None

    def refuse_uneven(self, counts: list[float], expected: int) -> None:
        """PlanError, on all ranks, unless every parameter was used in all `expected` micro-batches of all ranks."""
        for name, count in zip(self.names, counts):
            if count != expected:
                raise PlanError(
                    f"{name} got a gradient in {count:.0f} of the {expected} micro-batches of this step. DeepSpeed's "
                    "stages 1 to 3 want one of every trained parameter in each, on every rank, or they compute others.",
                    hint="Freeze what is not used (requires_grad_(False)), or set plan.engine=native or plan.zero=0.",
                )


def refuse_for_deepspeed(model: nn.Module, optimizer: Optimizer, plan: Plan, world_size: int) -> None:
    """PlanError for what DeepSpeed cannot hold, or would step wrongly: on flat partitions shapes and norms are lost."""
    name = type(optimizer).__name__
    if isinstance(optimizer, JoinedOptimizer):
        raise PlanError(f"{name} steps several optimizers, of which DeepSpeed takes one. Set plan.engine=native.")
    for each, parameter in model.named_parameters():
        if parameter.ndim == 0 and world_size > 1:
            raise PlanError(
                f"Parameter {each} has no dimension, and DeepSpeed cannot send such to the other ranks. "
                "Make it of shape (1,), or set plan.engine=native."
            )
    wrong = TABLE.get(type(optimizer), Standing()).wrong_on_shards if plan.zero else ""
    if isinstance(optimizer, torch.optim.Adagrad) and plan.zero:
        wrong = "it would be made anew, without its learning rates"
    if wrong:
        raise PlanError(
            f"{name} does not work on DeepSpeed's partitions (plan.zero={plan.zero}): {wrong}. Use AdamW, or set "
            "plan.engine=native or plan.zero=0."
        )
    check_optimizer(optimizer, plan)


@contextmanager
def said_of_stage_3(plan: Plan) -> Iterator[None]:
    """Around a forward: a sentence where stage 3 cannot look into what modules hand on."""
    try:
        yield
    except TypeError as error:
        if plan.zero == 3 and "vars() argument" in str(error):
            raise PlanError(
                "A module takes or returns an object without a __dict__, into which DeepSpeed's stage 3 cannot look. "
                "Use a dict, a tuple or a dataclass without slots there, or set plan.engine=native or plan.zero=2."
            ) from error
        raise
