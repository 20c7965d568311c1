"""Classic silent bugs of parallel training, each planted into a rank's process before it trains."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from proof.running import spread
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from trainfleet.loss import LossSum
from trainfleet.plan import Plan


@dataclass(frozen=True, kw_only=True, slots=True)
class Bug:
    """A mistake, where it is planted, and what it should be found at."""

    name: str
    plan: Plan
    plant: Callable[[], None]
    at: str
    """A regular expression of the first tensor that it changes."""
    model: str = "gpt"


def _replace(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    setattr(owner, name, make(getattr(owner, name)))


def wrong_divisor() -> None:
    from trainfleet.parallel.engine import NativeEngine

    def make(finish: Any) -> Any:
        return lambda self, weight, scale: finish(self, weight * self.mesh.data_axes.size, scale)

    _replace(NativeEngine, "_finish_gradients", make)


def mean_of_means() -> None:
    from trainfleet.parallel import engine

    def make(checked: Any) -> Any:
        def mean(value: Any) -> LossSum:
            loss = checked(value)
            return LossSum(loss.total / loss.weight, 1.0)

        return mean

    _replace(engine, "checked_loss", make)


def repeated_micro_batch() -> None:
    from trainfleet.parallel.engine import NativeEngine

    def make(forward_backward: Any) -> Any:
        return lambda self, batches: forward_backward(self, [*batches[:-1], batches[-2]])

    _replace(NativeEngine, "forward_backward", make)


def rounded_twice() -> None:
    from trainfleet.parallel.replicate import Bucket

    def make(finish: Any) -> Any:
        def rounded(self: Any) -> None:
            self.work.wait()
            self.flat.copy_(self.flat.bfloat16())
            finish(self)

        return rounded

    _replace(Bucket, "finish", make)


def masks_of_another_rank() -> None:
    from trainfleet.parallel import engine

    _replace(engine, "number_in_step", lambda number: lambda *given: number(*given) ^ 1)


def norm_without(axis: str) -> None:
    from trainfleet.parallel import engine

    class Alone:
        size = 1

        def all_reduce_(self, tensor: Tensor) -> Any:
            return self

        def wait(self) -> None: ...

    def make(norm: Any) -> Any:
        def local(parameters: Any, shard_group: Any, tensor_group: Any = None, *others: Any) -> Tensor:
            if axis == "tp":
                return norm(parameters, shard_group, tensor_group and Alone(), *others)  # type: ignore[no-any-return]
            return norm(parameters, Alone(), tensor_group, *others)  # type: ignore[no-any-return]

        return local

    _replace(engine, "gradient_norm", make)


def scale_left_in() -> None:
    from trainfleet.parallel.engine import NativeEngine

    def make(finish: Any) -> Any:
        return lambda self, weight, scale: finish(self, weight, scale / 2)

    _replace(NativeEngine, "_finish_gradients", make)


def decayed_twice() -> None:
    def make(step: Any) -> Any:
        def twice(self: Any, *args: Any) -> Any:
            with torch.no_grad():
                for group in self.param_groups:
                    for parameter in group["params"]:
                        parameter.mul_(1 - group["lr"] * group["weight_decay"])
            return step(self, *args)

        return twice

    _replace(torch.optim.AdamW, "step", make)


def forgotten_shard() -> None:
    def make(step: Any) -> Any:
        def forgetful(self: Any, *args: Any) -> Any:
            kept = [(p, p.to_local().clone()) for group in self.param_groups for p in group["params"]]
            result = step(self, *args)
            if torch.distributed.get_rank() == 1:
                with torch.no_grad():
                    for parameter, value in kept:
                        parameter.to_local().copy_(value)
            return result

        return forgetful

    _replace(torch.optim.AdamW, "step", make)


def missing_sum_of_a_row() -> None:
    from trainfleet.parallel.tensor import exchange, region

    def make(placed: Any) -> Any:
        def unsummed(array: DTensor, *placements: Any) -> DTensor:
            if array.placements[0].is_partial():
                return DTensor.from_local(array.to_local(), array.device_mesh, [Replicate()], run_check=False)
            return placed(array, *placements)  # type: ignore[no-any-return]

        return unsummed

    for module in (region, exchange):
        _replace(module, "placed", make)


def own_masks_of_pieces() -> None:
    from trainfleet.parallel.tensor import region

    def own(mesh: Any, whole: Any, input: DTensor, p: float = 0.5, training: bool = True, **others: Any) -> Any:
        rank = mesh.get_local_rank()
        local = input.to_local()
        with torch.random.fork_rng():
            torch.manual_seed(rank)
            mask = torch.nn.functional.dropout(torch.ones_like(local), p, training)
        return input * DTensor.from_local(mask, input.device_mesh, input.placements, run_check=False)

    for function in (torch.nn.functional.dropout, torch.dropout):
        region._SPECIAL[function] = own


def unsummed_gradients_of_copies() -> None:
    from trainfleet.parallel.context import lift

    def make(gradient_of: Any) -> Any:
        return lambda axis, own, placement: placement if placement.is_partial() else gradient_of(axis, own, placement)

    _replace(lift, "_gradient_of", make)


def positions_of_each_rank() -> None:
    import gpt

    def make(rotary: Any) -> Any:
        def restarted(self: Any, length: int, device: Any) -> tuple[Tensor, Tensor]:
            cos, sin = rotary(self, length // 2, device)
            return torch.cat([cos, cos]), torch.cat([sin, sin])

        return restarted

    _replace(gpt.GPT, "_rotary", make)


def future_in_the_ring() -> None:
    from trainfleet.parallel.context import attention

    _replace(
        attention, "ring_attention", lambda ring: lambda *args, **kwargs: ring(*args, **{**kwargs, "causal": False})
    )


def piece_of_another_rank() -> None:
    from trainfleet.parallel.context.handover import Handover
    from trainfleet.parallel.tensor.exchange import whole_of

    def make(leaving: Any) -> Any:
        def of_another(self: Any, tensor: Any) -> Tensor:
            is_sequence = isinstance(tensor, DTensor) and tensor.ndim > 1 and tensor.shape[1] == self.length
            if is_sequence:
                tensor = whole_of(tensor).roll(self.length // 2, 1)
            return leaving(self, tensor)  # type: ignore[no-any-return]

        return of_another

    _replace(Handover, "leaving", make)


def stale_tied_weight() -> None:
    from trainfleet.parallel.pipeline import engine

    _replace(engine, "sum_tied_gradients", lambda total: lambda pipeline, model: None)


def gradient_lost_between_stages() -> None:
    from trainfleet.parallel.pipeline.flow import Flow

    def make(depart: Any) -> Any:
        def lost(self: Any, kind: str, place: Any, tensors: Any, head: Any) -> None:
            if kind == "B" and place[1] == 0:
                tensors = [None if each is None else torch.zeros_like(each) for each in tensors]
            depart(self, kind, place, tensors, head)

        return lost

    _replace(Flow, "_depart", make)


def targets_of_another_micro_batch() -> None:
    from trainfleet.parallel.pipeline.engine import PipelineEngine

    def make(loss_of: Any) -> Any:
        kept: list[Any] = []

        def shifted(self: Any, output: Any, batch: Any) -> Any:
            kept.append(batch)
            return loss_of(self, output, kept[max(0, len(kept) - 2)])

        return shifted

    _replace(PipelineEngine, "_loss_of", make)


BUGS = [
    Bug(name="the gradient is divided by the ranks twice", plan=spread(dp_replicate=2), plant=wrong_divisor,
        at="step 1, gradient of"),
    Bug(name="ranks are averaged, not tokens", plan=spread(dp_replicate=2), plant=mean_of_means, at="step 1, loss"),
    Bug(name="a micro-batch is dropped, another taken twice", plan=spread(dp_replicate=2), plant=repeated_micro_batch,
        at="step 1, micro-batch 7, output of"),
    Bug(name="gradients are rounded to bf16 on the way", plan=spread(dp_replicate=2), plant=rounded_twice,
        at="step 1, gradient of"),
    Bug(name="dropout with another rank's masks", plan=spread(dp_replicate=2), plant=masks_of_another_rank,
        at=r"step 1, micro-batch \d, output of transformer.drop", model="gpt2"),
    Bug(name="the norm is that of one shard", plan=spread(zero=2, dp_shard=2),
        plant=functools.partial(norm_without, "dp_shard"), at="step 1, gradient norm"),
    Bug(name="the loss scale is left in the gradient", plan=spread(precision="fp16", dp_replicate=2),
        plant=scale_left_in, at="step 1, gradient of"),
    Bug(name="weight decay is applied twice", plan=spread(zero=1, dp_shard=2), plant=decayed_twice,
        at="step 1, parameter"),
    Bug(name="a rank forgets to update its shard", plan=spread(zero=3, dp_shard=2), plant=forgotten_shard,
        at="step 1, parameter"),
    Bug(name="the norm is that of one rank's columns and rows", plan=spread(tp=2),
        plant=functools.partial(norm_without, "tp"), at="step 1, gradient norm"),
    Bug(name="a row-split layer is not summed over ranks", plan=spread(tp=2), plant=missing_sum_of_a_row,
        at=r"step 1, micro-batch 1, output of blocks.0.attention"),
    Bug(name="each rank draws the masks of its pieces", plan=spread(tp=2), plant=own_masks_of_pieces,
        at=r"step 1, micro-batch 1, output of transformer.h.0.(attn|mlp)", model="gpt2"),
    Bug(name="copies keep the gradients of one rank's positions", plan=spread(tp=2, tp_sequence=True),
        plant=unsummed_gradients_of_copies, at=r"step 1, gradient of"),
    Bug(name="rotary positions begin anew on each rank", plan=spread(cp=2), plant=positions_of_each_rank,
        at=r"step 1, micro-batch 1, output of blocks.0.attention"),
    Bug(name="the ring lets positions see later ones", plan=spread(cp=2), plant=future_in_the_ring,
        at=r"step 1, micro-batch 1, output of blocks.0.attention"),
    Bug(name="a stage hands on the piece of another rank", plan=spread(cp=2, pp=2), plant=piece_of_another_rank,
        at=r"step 1, micro-batch 1, output of blocks.2"),
    Bug(name="a tied weight gets the gradient of one stage", plan=spread(pp=2), plant=stale_tied_weight,
        at=r"step 1, gradient of transformer.wte.weight", model="gpt2"),
    Bug(name="a micro-batch's gradient is lost between stages", plan=spread(pp=2), plant=gradient_lost_between_stages,
        at=r"step 1, gradient of embeddings"),
    Bug(name="the loss takes the targets of another micro-batch", plan=spread(pp=2),
        plant=targets_of_another_micro_batch, at="step 1, loss"),
]  # fmt: skip
