"""Batch normalisation over the batches of all data-parallel ranks, on the CPU too (torch's SyncBatchNorm refuses it).

Each rank sends (count, mean, sum of squared deviations) of its part, and all ranks join them alike
(Chan, Golub, LeVeque 1979), so that large means cost no precision:

    n = Σ nᵣ    mean = Σ nᵣ meanᵣ / n    M = Σ Mᵣ + nᵣ (meanᵣ - mean)²    var = M / n    running_var takes M / (n - 1)

Micro-batch i is normalised with the statistics of micro-batch i of all ranks, never with those of a whole
step. So N ranks that accumulate equal one process that gets, as its micro-batch i, those of all ranks put together.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.lazy import LazyModuleMixin

from trainfleet.comm.group import Group
from trainfleet.errors import PlanError
from trainfleet.parallel.pipeline.cut import Elsewhere
from trainfleet.parallel.tensor.channels import gathered, has_own_channels, in_place_of, own
from trainfleet.parallel.tensor.exchange import local_of, whole_of

_RUNNING = ("running_mean", "running_var")


def sync_batch_stats(model: nn.Module, group: Group) -> nn.Module:
    """Let each batch normalisation of `model` see the batches of all members of `group` while it trains.

    Returns the same model; its BatchNorm modules are now of a subclass of their class, so names, buffers and
    `isinstance` stay. Evaluation is as before. The gradients of weight and bias are this rank's part, to be averaged
    like any others. Members run the same modules in the same order, and divide their losses by the same number
    before backward, since the gradient of an input mixes those of all ranks. PlanError names a module that cannot
    be synchronised; then nothing is changed.
    """
    if group.size == 1:
        return model
    for name, module in model.named_modules():
        if reason := _obstacle(module):
            raise PlanError(
                f"{name or 'The model'} ({type(module).__name__}) {reason} Set plan.sync_batch_stats=false to let "
                "every rank take the statistics of its own batch, which one process would not."
            )
    synced: dict[type[_BatchNorm], Any] = {}
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            plain = type(module)
            if plain not in synced:
                # The group belongs to the class, so that a copy of the module shares it.
                synced[plain] = type(f"Synced{plain.__name__}", (SyncedBatchNorm, plain), {"group": group})
            module.__class__ = synced[plain]
    return model


class SyncedBatchNorm(_BatchNorm):
    """Goes before the class of a BatchNorm: its training forward takes the statistics of all members of `group`."""

    group: ClassVar[Group]

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        # float32 at least: under autocast the input is narrow, and sums over a batch are long.
        wide = input.to(torch.promote_types(input.dtype, torch.float32))
        output, mean, variance, count = self._normalised(wide)
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            share: Any = 1.0 / self.num_batches_tracked.float() if self.momentum is None else self.momentum
            _move(self.running_mean, mean, share)
            _move(self.running_var, variance * (count / (count - 1).clamp(min=1)), share)
        return output.to(input.dtype)

    def _normalised(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(output, mean, variance, count); of pieces, each rank normalises its channels, or all of them."""
        affine = [self.weight, self.bias]
        if not isinstance(x, DTensor):
            return _Normalise.apply(x, *affine, self.eps, self.group)  # type: ignore[no-any-return,no-untyped-call]
        if has_own_channels(x):
            parts = [own(each, x.device_mesh) for each in affine]
            output, *found, count = _Normalise.apply(local_of(x), *parts, self.eps, self.group)  # type: ignore[no-untyped-call]
            mean, variance = gathered(x.device_mesh, *found)
            return in_place_of(output, x), mean, variance, count
        wholes = [whole_of(each) if isinstance(each, DTensor) else each for each in affine]
        output, mean, variance, count = _Normalise.apply(whole_of(x), *wholes, self.eps, self.group)  # type: ignore[no-untyped-call]
        copies = [Replicate()] * x.device_mesh.ndim
        return DTensor.from_local(output, x.device_mesh, copies, run_check=False), mean, variance, count


class _Normalise(torch.autograd.Function):
    """(output, mean, variance, count), the statistics over all ranks; x is N x C x ..."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: Group
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, variance, count = _join(_part(x), group)
        scale, shift = (None if each is None else each.to(x.dtype) for each in (weight, bias))
        ctx.group, ctx.eps, ctx.dtype = group, eps, None if weight is None else weight.dtype
        ctx.save_for_backward(x, scale, mean, variance, count)
        if x.numel():
            output = nn.functional.batch_norm(x, mean, variance, scale, shift, training=False, eps=eps)
        else:
            output = torch.empty_like(x)  # the kernels divide by the number of samples
        ctx.mark_non_differentiable(mean, variance, count)
        return output, mean, variance, count

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance, count = ctx.saved_tensors
        if x.numel():
            # As if the statistics were constants; of these, the sums are all that their own gradient needs.
            of_input, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
                gradient, x, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
            )
        else:
            of_input, of_weight, of_bias = torch.empty_like(x), torch.zeros_like(mean), torch.zeros_like(mean)
        if ctx.needs_input_grad[0]:
            sums = torch.cat([of_bias, of_weight])
            ctx.group.all_reduce_(sums).wait()
            inverse_std = torch.rsqrt(variance + ctx.eps)
            scale = inverse_std if weight is None else inverse_std * weight
            level, slope = (sums / count).view(2, -1) * scale
            of_input.sub_(_by_channel(level, x)).sub_(
                (x - _by_channel(mean, x)).mul_(_by_channel(slope * inverse_std, x))
            )
        if ctx.dtype is None:
            return of_input, None, None, None, None
        return of_input, of_weight.to(ctx.dtype), of_bias.to(ctx.dtype), None, None


def _part(x: Tensor) -> Tensor:
    """This rank's [mean of each channel, sum of squared deviations of each channel, count]."""
    count = x.numel() // x.shape[1]
    if count == 0:
        return x.new_zeros(2 * x.shape[1] + 1)
    # What BatchNorm itself calls: four times as fast as var_mean on a CPU, and it accumulates in float64 there.
    mean, variance = torch.batch_norm_update_stats(x, None, None, 0.0)
    return torch.cat([mean, variance * count, x.new_full((1,), count)])


def _join(part: Tensor, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and count over all ranks."""
    parts = torch.stack(group.all_gather(part))
    counts = parts[:, -1:]
    means, squares = parts[:, :-1].chunk(2, dim=1)
    count = counts.sum()
    mean = (counts * means).sum(0) / count
    variance = (squares + counts * (means - mean).square()).sum(0) / count
    return mean, variance, count


@torch.no_grad()
def _move(running: Tensor, value: Tensor, share: Any) -> None:
    running.copy_(running * (1 - share) + value * share)


def _by_channel(value: Tensor, like: Tensor) -> Tensor:
    return value.view(1, -1, *[1] * (like.ndim - 2))


def _obstacle(module: nn.Module) -> str | None:
    """Why the statistics of `module` cannot be synchronised; None if they can, or if it has none."""
    if isinstance(module, Elsewhere):
        return None  # another stage of a pipeline sees to it
    if isinstance(module, SyncedBatchNorm):
        return "is synchronised already."
    if isinstance(module, nn.SyncBatchNorm):
        return None if module.process_group is None else "synchronises over a process group of its own."
    if isinstance(module, _BatchNorm) and isinstance(module, LazyModuleMixin):
        return "does not know its channels yet. Run the model once on one batch, then spread it."
    if isinstance(module, _BatchNorm):
        return (
            None if type(module).forward is _BatchNorm.forward else "has a forward of its own, which we cannot change."
        )
    keeps = [name for name in _RUNNING if getattr(module, name, None) is not None]
    if not keeps or type(module).__name__.startswith("Frozen"):
        return None
    kind = "its instances" if isinstance(module, _InstanceNorm) else "batches in a way of its own"
    return f"keeps statistics over {kind} ({', '.join(keeps)}), which would differ from rank to rank."
