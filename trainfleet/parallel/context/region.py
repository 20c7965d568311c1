"""Context: a model computes with sequences in pieces, each rank its positions; what mixes positions is computed whole.

User code sees DTensors with the shape of the whole, so positions, masks and lengths are those of the whole. Functions
that are held against the whole compute on pieces, every other on the whole, of which each rank then keeps its piece:
a wrong guess costs time, never the result.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.overrides import TorchFunctionMode

from trainfleet.batch import Batch, arrays, map_arrays
from trainfleet.comm.group import Group
from trainfleet.errors import PlanError
from trainfleet.parallel.context.attention import Kind, attention_on_pieces
from trainfleet.parallel.context.functions import RULES
from trainfleet.parallel.context.lift import AXIS, lifted, lowered, names, plain_of
from trainfleet.parallel.context.sequence import SWITCH_OFF, described, length_of, split_sequences
from trainfleet.parallel.tensor.attention import split_attention
from trainfleet.parallel.tensor.dropout import split_dropout
from trainfleet.parallel.tensor.exchange import OUTER, placed, whole_of
from trainfleet.parallel.tensor.functions import ASKED, BY_ELEMENT, chunk, iterate, split, splits, unbind
from trainfleet.parallel.tensor.region import mapped, writes
from trainfleet.parallel.tensor.sequence import OnSequences
from trainfleet.parallel.torch_private import EnoughRecomputed, StridedShard, function_modes

logger = logging.getLogger(__name__)

_SPECIAL: dict[Any, Callable[..., Any]] = {
    **RULES,
    **dict.fromkeys((torch.nn.functional.dropout, torch.dropout), split_dropout),
    **dict.fromkeys((torch.chunk, Tensor.chunk), chunk),
    **dict.fromkeys((torch.split, Tensor.split), split),
    **dict.fromkeys((torch.unbind, Tensor.unbind), unbind),
    Tensor.__iter__: iterate,
}

ON_FLAT = BY_ELEMENT | ASKED | {"view", "reshape", "unflatten", "linear", "addmm", "mm"}
ON_FLAT |= {"softmax", "log_softmax", "sum", "layer_norm"}
"""Functions that compute on pieces of a dimension made of several, such as batch x sequence."""

_UNTOUCHED = frozenset({"__set__", "backward", "grad", "register_hook", "requires_grad_", "retain_grad"})
"""They concern the tensor itself, not its numbers."""


class Context:
    """What a model with its sequences in pieces has: enters and leaves the computation on pieces."""

    def __init__(
        self,
        mesh: DeviceMesh,
        kind: Kind = "ring",
        *,
        with_tensor: DeviceMesh | None = None,
        keep_over: Group | None = None,
        keeps_logits: bool = False,
    ) -> None:
        """`mesh` has the axis cp, or tp; `with_tensor` the axes cp and tp, where layers are split too.

        `keep_over` is the Group of tp, where what split layers get is to be kept in pieces for backward. With
        `keeps_logits`, what heads give stays in pieces over both axes.
        """
        self._keeps_logits = keeps_logits
        self._keep_over = keep_over
        self.mesh, self.kind = mesh, kind
        (self.axis,) = names(mesh)
        self._with_tensor = with_tensor
        self._said: set[str] = set()
        self._local = threading.local()
        self._length = 0

    @property
    def mode(self) -> OnPieces | OnSequences | None:
        """The mode that this thread is in: between split layers, or inside of one."""
        return getattr(self._local, "mode", None)

    def run(self, compute: Callable[[Batch], Any], batch: Batch, *, strict: bool = False) -> Any:
        """`compute(batch)` with the batch's sequences in pieces; its result whole, equal on all ranks.

        Where the ranks do not divide the sequence, all of it is computed by each; DataError then, if `strict`.
        """
        pieces, length = self.split(batch, strict=strict)
        if length is None:
            return compute(batch)
        with self.on_pieces(length):
            result = compute(pieces)
        return map_arrays(_whole, result)

    def split(self, batch: Batch, *, strict: bool = False) -> tuple[Batch, int | None]:
        """The batch in pieces, and the length of its sequences; None where it stays whole, as `run` says."""
        length = length_of(batch, self.mesh.size(), strict=strict, axis=self.axis)
        if length is None:
            return batch, None
        if not self._length:
            said = described(batch, length)
            logger.info("Sequences in pieces over %d ranks of %s: %s.", self.mesh.size(), self.axis, said)
        self._length = length
        return split_sequences(batch, self.mesh, length), length

    def on_pieces(self, length: int) -> AbstractContextManager[None]:
        """Inside, this thread computes on pieces of sequences of `length`."""
        return self._entered(OnPieces(self, self.mesh, length))

    def reentering(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """`forward` on pieces also where it runs outside of `run`, as what is recomputed in backward does."""

        @functools.wraps(forward)
        def entered(*args: Any, **kwargs: Any) -> Any:
            if self.mode is not None or not self._has_pieces((args, kwargs)):
                return forward(*args, **kwargs)
            # What is recomputed is in the modes of its forward; in a pipeline, others may have begun since.
            lengths = [mode.length for mode in function_modes() if isinstance(mode, OnPieces) and mode.is_of(self)]
            with self.on_pieces(lengths[0] if lengths else self._length):
                return forward(*args, **kwargs)

        return entered

    def on_calls(self, model: nn.Module) -> None:
        """Let calls of `model` with plain tensors be split too, where gradients are wanted; others compute whole."""
        forward = model.forward

        @functools.wraps(forward)
        def split_or_whole(*args: Any, **kwargs: Any) -> Any:
            if self.mode is not None or not torch.is_grad_enabled() or not model.training:
                return forward(*args, **kwargs)
            return self.run(lambda given: forward(*given[0], **given[1]), (args, kwargs))

        model.forward = split_or_whole  # type: ignore[method-assign]

    @property
    def is_between_layers(self) -> bool:
        """Whether this thread computes on pieces of sequences, outside of split layers."""
        return isinstance(self.mode, OnPieces) and self.mode.mesh == self.mesh

    def split_layer(
        self, forward: Callable[..., Any], name: str, said: set[str], args: Any, kwargs: Any, *, is_head: bool = False
    ) -> Any:
        """The forward of the module `name`, whose parameters lie over the axis tp; of a head, `is_head`.

        Over cp it is computed on pieces of both axes. Over tp sequences are gathered for it, and scattered after it
        (Korthikanti et al., arXiv:2205.05198).
        """
        mode = self.mode
        assert isinstance(mode, OnPieces)
        if self._with_tensor is None:
            inside = OnSequences(name, self.mesh, said, mode.length)
            with self._known(inside):
                return inside.compute(forward, args, kwargs, self._keep_over)
        args, kwargs = map_arrays(functools.partial(lifted, mesh=self._with_tensor), (args, kwargs))
        with self._entered(OnPieces(self, self._with_tensor, mode.length)):
            output = forward(*args, **kwargs)
        if is_head and self._keeps_logits:
            return output
        return map_arrays(functools.partial(lowered, mesh=self.mesh), output)

    def wider(self, found: list[Any], length: int) -> OnPieces | None:
        """What computes on pieces of both axes outside of layers, where some of `found` (logits) lie so."""
        if not self._keeps_logits or not any(
            isinstance(each, DTensor) and each.device_mesh == self._with_tensor for each in found
        ):
            return None
        assert self._with_tensor is not None
        return OnPieces(self, self._with_tensor, length)

    def _has_pieces(self, value: Any) -> bool:
        return any(isinstance(array, DTensor) and array.device_mesh == self.mesh for array in arrays(value))

    @contextmanager
    def _entered(self, mode: OnPieces) -> Iterator[None]:
        with self._known(mode), mode:
            yield

    @contextmanager
    def _known(self, mode: OnPieces | OnSequences) -> Iterator[None]:
        """While `mode` is entered, those around it let functions pass."""
        before, outer = self.mode, getattr(OUTER, "context", None)
        self._local.mode, OUTER.context = mode, self
        try:
            yield
        finally:
            self._local.mode, OUTER.context = before, outer


class OnPieces(TorchFunctionMode):
    """While it is entered, every function of torch takes DTensors of `mesh` and plain tensors together."""

    def __init__(self, context: Context, mesh: DeviceMesh, length: int) -> None:
        super().__init__()
        self.length = length
        self.mesh = mesh
        self._context = context
        self._axis = names(mesh).index(context.axis)
        self._said = context._said

    def is_of(self, context: Context) -> bool:
        return self._context is context

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if self._context.mode is not self:  # another is entered inside of this one
            return func(*args, **kwargs)
        found = arrays((args, kwargs))
        if self.mesh == self._context.mesh and (wider := self._context.wider(found, self.length)) is not None:
            return wider.compute(func, found, args, kwargs)
        return self.compute(func, found, args, kwargs)

    def compute(self, func: Any, found: list[Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """`func` of these arguments, in which there are the arrays `found`."""
        pieces = [array for array in found if isinstance(array, DTensor) and array.device_mesh == self.mesh]
        called = getattr(func, "__name__", str(func))
        if not pieces or called in _UNTOUCHED:
            return func(*args, **kwargs)
        in_place = writes(called, kwargs)
        if in_place and not isinstance(args[0], DTensor):
            args, kwargs = map_arrays(plain_of, (args, kwargs))
            return func(*args, **kwargs)
        if len(pieces) < len(found):
            args, kwargs = map_arrays(functools.partial(lifted, mesh=self.mesh), (args, kwargs))
        if in_place:
            return self._change(func, called, args, kwargs)
        result = self._computed(func, called, pieces, args, kwargs)
        return mapped(functools.partial(self._settled, self._dim_of(pieces)), result)

    def _computed(self, func: Any, called: str, pieces: list[DTensor], args: Any, kwargs: Any) -> Any:
        whole = functools.partial(self._compute_whole, func, called)
        if func is torch.nn.functional.scaled_dot_product_attention:
            if self._context.axis != AXIS:
                return split_attention(self.mesh, whole, *args, **kwargs)
            return attention_on_pieces(self._context.kind, self.mesh, whole, *args, **kwargs)
        is_flat = any(_is_flat(each) for each in pieces)
        if (rule := (RULES if is_flat else _SPECIAL).get(func)) is not None:
            return rule(self.mesh, whole, *args, **kwargs)
        if splits(called, args) and (called in ON_FLAT or not is_flat):
            try:
                return func(*args, **kwargs)
            except EnoughRecomputed:
                raise
            except Exception as exc:  # where the whole fails too, that is the error of the model itself
                logger.debug("%s: %s", called, exc)
        return whole(*args, **kwargs)

    def _compute_whole(self, func: Any, called: str, *args: Any, **kwargs: Any) -> Any:
        if called not in self._said and any(not _is_copy(each) for each in arrays((args, kwargs))):
            self._said.add(called)
            logger.info("%s is computed on the whole sequence by each rank of %s.", called, self._context.axis)
        args, kwargs = map_arrays(_whole, (args, kwargs))
        return mapped(functools.partial(_copied, self.mesh), func(*args, **kwargs))

    def _dim_of(self, pieces: list[DTensor]) -> int:
        """The dimension along which what is computed from these is cut, if it is whole and as long."""
        placements = [each.placements[self._axis] for each in pieces]
        return next((placement.dim for placement in placements if type(placement) is Shard), 1)

    def _settled(self, dim: int, tensor: Any) -> Any:
        """Sums that are still spread over the ranks are taken at once; what came out whole is cut again."""
        if not isinstance(tensor, DTensor):
            return tensor
        wanted = [_known(placement) for placement in tensor.placements]
        if wanted[self._axis].is_replicate() and tensor.ndim > dim > 0 and tensor.shape[dim] == self.length:
            wanted[self._axis] = Shard(dim)
        tensor = placed(tensor, *wanted)
        if tensor.requires_grad and not tensor.is_leaf:
            tensor.register_hook(functools.partial(_as_placed, tensor.placements))  # type: ignore[no-untyped-call]
        return tensor

    def _change(self, func: Any, called: str, args: Any, kwargs: Any) -> Any:
        """A function that changes its first argument. What does not compute on pieces is done without gradients."""
        target: DTensor = args[0]
        if splits(called, args):
            try:
                return func(*args, **kwargs)
            except EnoughRecomputed:
                raise
            except Exception as exc:
                logger.debug("%s: %s", called, exc)
        if torch.is_grad_enabled() and any(each.requires_grad for each in arrays((args, kwargs))):
            raise PlanError(
                f"The model calls {called} on a tensor that is split over the {self.mesh.size(self._axis)} ranks of "
                f"plan.{self._context.axis}, which cannot be done in place where gradients flow. Call the form that "
                f"returns a new tensor, or set {SWITCH_OFF[self._context.axis]}."
            )
        args, kwargs = map_arrays(_whole, (args, kwargs))
        func(*args, **kwargs)
        with torch.no_grad():
            again = placed(_copied(self.mesh, args[0]), *target.placements)
            target.to_local().copy_(again.to_local())
        return target


def _whole(tensor: Any) -> Any:
    return whole_of(tensor) if isinstance(tensor, DTensor) else tensor


def _copied(mesh: DeviceMesh, tensor: Any) -> Any:
    """A whole tensor that all ranks have computed alike."""
    if not isinstance(tensor, Tensor) or isinstance(tensor, DTensor):
        return tensor
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


def _known(placement: Placement) -> Placement:
    return placement if type(placement) in (Shard, Replicate, StridedShard) else Replicate()


def _is_flat(array: DTensor) -> bool:
    return any(isinstance(placement, StridedShard) for placement in array.placements)


def _is_copy(array: Any) -> bool:
    return not isinstance(array, DTensor) or all(placement.is_replicate() for placement in array.placements)


def _as_placed(placements: tuple[Placement, ...], gradient: Tensor) -> Tensor:
    """torch places what meets another placement anew without telling autograd; views of backward may fail there."""
    if not isinstance(gradient, DTensor) or gradient.placements == placements:
        return gradient
    wanted = [
        own if type(have) in (Shard, StridedShard) and have != own else have
        for own, have in zip(placements, gradient.placements)
    ]
    return placed(gradient, *wanted)
