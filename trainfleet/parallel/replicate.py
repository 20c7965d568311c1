"""Average the gradients of parameters that every rank holds whole, while backward still runs.

Buckets are filled in the order in which backward reaches the parameters and leave for the wire as soon
as they are full, as in PyTorch's DistributedDataParallel (Li et al., VLDB 2020). Nothing is wrapped: hooks
sit on the parameters, so any entry point of the model works.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainfleet.comm.group import Group, Work
from trainfleet.errors import PlanError
from trainfleet.parallel.layout import is_split_over, piece_of
from trainfleet.parallel.torch_private import with_local

BUCKET_BYTES = 25 << 20  # what DistributedDataParallel uses; the first bucket is small so that it leaves early
FIRST_BUCKET_BYTES = 1 << 20


def refuse_sparse_gradients(model: nn.Module) -> None:
    """PlanError for an embedding that makes sparse gradients, which cannot be averaged with others."""
    for name, module in model.named_modules():
        if getattr(module, "sparse", False) and isinstance(module, nn.Embedding | nn.EmbeddingBag):
            raise PlanError(
                f"{name or 'The model'} is a {type(module).__name__} with sparse=True, whose sparse gradients are not "
                "exchanged between ranks. Build it with sparse=False, or train on one rank with plan.zero=0."
            )


class Bucket:
    """Parameters of one dtype whose gradients travel together."""

    def __init__(self, parameters: Sequence[nn.Parameter], group: Group) -> None:
        self.parameters = list(parameters)
        self._group = group
        self.ready: set[nn.Parameter] = set()
        self.work: Work | None = None
        self.flat: Tensor | None = None

    @property
    def is_full(self) -> bool:
        return len(self.ready) == len(self.parameters)

    def launch(self) -> None:
        """Send the mean of all ranks' gradients; a gradient that this rank lacks counts as zero."""
        self.flat = torch.cat([_flat_gradient(parameter) for parameter in self.parameters])
        self.work = self._group.all_reduce_(self.flat, op="mean")

    def finish(self) -> None:
        """Wait, and let each gradient be its part of the bucket."""
        assert self.work is not None and self.flat is not None
        self.work.wait()
        locals_ = [piece_of(parameter) for parameter in self.parameters]
        parts = torch.split(self.flat, [local.numel() for local in locals_])
        for parameter, local, part in zip(self.parameters, locals_, parts):
            gradient = part.view_as(local)
            parameter.grad = with_local(parameter, gradient) if isinstance(parameter, DTensor) else gradient
        self.work, self.flat = None, None
        self.ready.clear()


class GradientAverage:
    """The mean over `group` of the gradients of `parameters`, taken in every backward while `enabled`.

    `overlap=False` sends nothing before backward is over. It must be so beside sharded parameters, whose exchanges
    share the wire: a rank that skips a parameter sends later than others, and all must send in one order.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        group: Group,
        *,
        overlap: bool = True,
        expert_group: Group | None = None,
    ) -> None:
        """`expert_group` are the ranks that hold the same of the experts that are dealt out."""
        self.enabled = True
        """False while micro-batches accumulate."""
        self._due = False  # an exchange has begun, or must take place, and is not finished
        self._is_expected = False  # somebody will call `finish`, so backward need not wait
        self._overlap = overlap
        experts = [parameter for parameter in parameters if is_split_over(parameter, "ep")]
        others = [parameter for parameter in parameters if not is_split_over(parameter, "ep")]
        self._buckets = _buckets(others, group) if group.size > 1 else []
        if expert_group is not None and expert_group.size > 1:
            self._buckets += _buckets(experts, expert_group)
        self._bucket_of = {parameter: bucket for bucket in self._buckets for parameter in bucket.parameters}
        self._launched = 0
        for parameter in self._bucket_of:
            parameter.register_post_accumulate_grad_hook(self._on_gradient)  # type: ignore[no-untyped-call]

    def expect(self) -> None:
        """An exchange must take place before `finish` returns, even if backward reaches no parameter here."""
        self.enabled = True
        self._due = self._is_expected = bool(self._buckets)

    def _on_gradient(self, parameter: Tensor) -> None:
        if not self.enabled:
            return
        if not any(bucket.ready for bucket in self._buckets):
            # Runs when this backward is over: parameters it did not reach must not keep a bucket waiting.
            torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)  # type: ignore[attr-defined]
            self._due = True
        assert isinstance(parameter, nn.Parameter)
        self._bucket_of[parameter].ready.add(parameter)
        # Every rank must launch in the same order, so a full bucket waits for those before it.
        while self._overlap and self._launched < len(self._buckets) and self._buckets[self._launched].is_full:
            self._buckets[self._launched].launch()
            self._launched += 1

    def _end_backward(self) -> None:
        self.send()
        if not self._is_expected:
            self.finish()

    def send(self) -> None:
        """Send what is still here. Until `finish`, gradients are those of this rank alone."""
        if self._due:
            for bucket in self._buckets[self._launched :]:
                bucket.launch()
            self._launched = len(self._buckets)

    def forget(self) -> None:
        """After an error in backward: what has begun is not awaited, and nothing of it counts."""
        for bucket in self._buckets:
            bucket.work, bucket.flat = None, None
            bucket.ready.clear()
        self._launched = 0
        self._due = self._is_expected = False

    def finish(self) -> None:
        """Send what is still here and wait for all of it; calling again does nothing.

        Backward calls it by itself where nobody has said with `expect` that they will.
        """
        if not self._due:
            return
        self.send()
        for bucket in self._buckets:
            bucket.finish()
        self._launched = 0
        self._due = self._is_expected = False


def _flat_gradient(parameter: nn.Parameter) -> Tensor:
    """This rank's gradient; of what tensor-parallel ranks have split, that of its piece."""
    if parameter.grad is None:
        return torch.zeros(piece_of(parameter).numel(), dtype=parameter.dtype, device=parameter.device)
    return piece_of(parameter.grad).reshape(-1)


def _buckets(parameters: list[nn.Parameter], group: Group) -> list[Bucket]:
    """Backward reaches the last parameters first, so buckets go from the last to the first."""
    buckets: list[Bucket] = []
    by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
    size: dict[torch.dtype, int] = {}
    for parameter in reversed([p for p in parameters if p.requires_grad]):
        held = by_dtype.setdefault(parameter.dtype, [])
        held.append(parameter)
        size[parameter.dtype] = size.get(parameter.dtype, 0) + parameter.numel() * parameter.element_size()
        if size[parameter.dtype] >= (BUCKET_BYTES if buckets else FIRST_BUCKET_BYTES):
            buckets.append(Bucket(held, group))
            by_dtype[parameter.dtype], size[parameter.dtype] = [], 0
    buckets.extend(Bucket(held, group) for held in by_dtype.values() if held)
    return buckets
