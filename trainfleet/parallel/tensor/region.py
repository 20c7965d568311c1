"""A region computes on pieces: whole tensors come in, DTensors are computed with, whole tensors go out.

User code keeps saying `view(B, T, heads, width)` with the numbers of the whole model, for DTensors have the shape of
the whole. Functions that are not known to be right on pieces (functions.py) are computed whole on every rank.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.overrides import TorchFunctionMode

from trainfleet.batch import arrays, map_arrays
from trainfleet.errors import PlanError
from trainfleet.parallel.tensor.attention import split_attention
from trainfleet.parallel.tensor.channels import BY_CHANNEL
from trainfleet.parallel.tensor.convolution import CONVOLUTIONS
from trainfleet.parallel.tensor.dropout import split_dropout
from trainfleet.parallel.tensor.exchange import OUTER, placed, whole_of
from trainfleet.parallel.tensor.functions import chunk, iterate, split, splits, unbind
from trainfleet.parallel.tensor.vocabulary import kept_in, split_cross_entropy, split_embedding
from trainfleet.parallel.torch_private import EnoughRecomputed

logger = logging.getLogger(__name__)

_SPECIAL: dict[Any, Callable[..., Any]] = {
    torch.nn.functional.scaled_dot_product_attention: split_attention,
    **dict.fromkeys((torch.nn.functional.dropout, torch.dropout), split_dropout),
    **dict.fromkeys((torch.chunk, Tensor.chunk), chunk),
    **dict.fromkeys((torch.split, Tensor.split), split),
    **dict.fromkeys((torch.unbind, Tensor.unbind), unbind),
    Tensor.__iter__: iterate,
    torch.nn.functional.embedding: split_embedding,
    torch.nn.functional.cross_entropy: split_cross_entropy,
    **CONVOLUTIONS,
    **BY_CHANNEL,
}
"""They get (mesh, compute whole, arguments of the function …) and have rules of their own."""


def on_pieces(forward: Callable[..., Any], name: str, mesh: DeviceMesh, *, is_head: bool = False) -> Callable[..., Any]:
    """`forward` of the module `name`, computed on pieces over `mesh`; takes and gives whole tensors.

    One that `is_head` gives pieces where `keeping_logits` computes the loss from them.
    """
    said: set[str] = set()

    @functools.wraps(forward)
    def computed(*args: Any, **kwargs: Any) -> Any:
        context = getattr(OUTER, "context", None)
        if context is not None and context.is_between_layers:
            return context.split_layer(forward, name, said, args, kwargs, is_head=is_head)
        if any(isinstance(array, DTensor) for array in arrays((args, kwargs))):
            return forward(*args, **kwargs)  # inside another region
        args, kwargs = map_arrays(functools.partial(copied, mesh), (args, kwargs))
        before, OUTER.is_inside = getattr(OUTER, "is_inside", False), True
        try:
            with OnPieces(name, mesh, said):
                output = forward(*args, **kwargs)
        finally:
            OUTER.is_inside = before
        logits = getattr(OUTER, "logits", None)
        if is_head and logits is not None:
            logits.has_begun = True
            return output
        return map_arrays(_whole, output)

    return computed


def keeping_logits(compute: Callable[[Any], Any], batch: Any, mesh: DeviceMesh) -> Any:
    """`compute(batch)`, of a model and its loss, with the logits of split heads in pieces; its result whole."""
    with kept_in(OUTER, _OnLogits("the loss", mesh, set())):
        result = compute(batch)
    return map_arrays(_whole, result)


def copied(mesh: DeviceMesh, tensor: Any) -> Any:
    """A whole tensor, equal on all ranks, as a DTensor. What ranks add to its gradient is summed."""
    if not isinstance(tensor, Tensor) or isinstance(tensor, DTensor):
        return tensor
    return DTensor.from_local(tensor, mesh, [Replicate()], run_check=False)


def _whole(tensor: Any) -> Any:
    """The whole of a DTensor, on every rank."""
    if not isinstance(tensor, DTensor):
        return tensor
    return whole_of(tensor)


def _as_placed(placement: Placement, gradient: Tensor) -> Tensor:
    if torch.is_grad_enabled():  # what torch exchanges in backward has no right gradient of its own
        raise PlanError(
            "A gradient is taken of a gradient (create_graph=True), as for forces or a gradient penalty, through a "
            "layer that plan.tp splits, which cannot be done. Set plan.tp to 1, or keep the layers whole: "
            "plan.tp_whole."
        )
    if isinstance(gradient, DTensor) and gradient.placements[0].is_shard() and gradient.placements[0] != placement:
        return placed(gradient, placement)
    return gradient


class OnPieces(TorchFunctionMode):
    """While it is entered, every function of torch takes DTensors and plain tensors together."""

    def __init__(self, name: str, mesh: DeviceMesh, said: set[str]) -> None:
        super().__init__()
        self._name, self._mesh, self._said = name, mesh, said

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        found = arrays((args, kwargs))
        pieces = [array for array in found if isinstance(array, DTensor)]
        if not pieces:
            return func(*args, **kwargs)
        called = getattr(func, "__name__", str(func))
        in_place = writes(called, kwargs)
        if in_place and not isinstance(args[0], DTensor):
            args, kwargs = map_arrays(_whole, (args, kwargs))
            return func(*args, **kwargs)
        if len(pieces) < len(found):
            args, kwargs = map_arrays(functools.partial(copied, self._mesh), (args, kwargs))
        if (rule := _SPECIAL.get(func)) is not None:
            whole = functools.partial(self._compute_whole, func)
            return mapped(self._settled, rule(self._mesh, whole, *args, **kwargs))
        if in_place:
            return self._change(func, called, args, kwargs)
        if splits(called, args):
            try:
                return mapped(self._settled, func(*args, **kwargs))
            except EnoughRecomputed:
                raise
            except Exception as exc:  # where the whole fails too, that is the error of the model itself
                logger.debug("%s in %s: %s", called, self._name, exc)
        result = self._compute_whole(func, *args, **kwargs)
        if called not in self._said and any(array.placements[0].is_shard() for array in pieces):
            self._said.add(called)
            logger.info("%s in %s is computed whole by each rank.", called, self._name or "the model")
        return result

    def _compute_whole(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = map_arrays(_whole, (args, kwargs))
        return mapped(functools.partial(copied, self._mesh), func(*args, **kwargs))

    def _settled(self, tensor: Any) -> Any:
        """Sums that are still spread over the ranks are taken at once, so that there are only pieces and copies.

        A gradient comes back as the tensor was placed: torch places what meets another placement anew without telling
        autograd, and the views of backward may not be possible there.
        """
        if not isinstance(tensor, DTensor):
            return tensor
        if type(tensor.placements[0]) not in (Shard, Replicate):
            tensor = placed(tensor, self._for_sum(tensor))
        if tensor.requires_grad and not tensor.is_leaf:
            tensor.register_hook(functools.partial(_as_placed, tensor.placements[0]))  # type: ignore[no-untyped-call]
        return tensor

    def _for_sum(self, tensor: DTensor) -> Placement:
        """How a sum over ranks is to lie."""
        return Replicate()

    def _change(self, func: Any, called: str, args: Any, kwargs: Any) -> Any:
        """A function that changes its first argument. What is not split is done on copies that need no gradient."""
        target = args[0]
        if splits(called, args):
            try:
                return func(*args, **kwargs)
            except EnoughRecomputed:
                raise
            except Exception as exc:
                raise self._refusal(called) from exc
        needs_gradient = torch.is_grad_enabled() and any(each.requires_grad for each in arrays((args, kwargs)))
        if needs_gradient or not target.placements[0].is_replicate():
            raise self._refusal(called)
        args, kwargs = map_arrays(_whole, (args, kwargs))
        func(*args, **kwargs)
        return target

    def _refusal(self, called: str) -> PlanError:
        name = self._name or "the model"
        return PlanError(
            f"{name} calls {called} on a tensor that is split over the {self._mesh.size()} ranks of plan.tp, which "
            "cannot be done in place. Call the form that returns a new tensor, or keep the module whole: "
            f"plan.tp_whole=[{name}]."
        )


class _OnLogits(OnPieces):
    """Computes with logits in pieces, outside of regions and after a head has made them."""

    has_begun = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if not self.has_begun or getattr(OUTER, "is_inside", False):
            return func(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


def mapped(function: Callable[[Any], Any], result: Any) -> Any:
    """Like `map_arrays`, for what functions of torch return; numbers and shapes stay as they are."""
    if isinstance(result, Tensor):
        return function(result)
    if isinstance(result, list | tuple) and any(isinstance(each, Tensor) for each in result):
        parts = [mapped(function, each) for each in result]
        if hasattr(result, "_fields"):
            return type(result)(*parts)
        return type(result)(parts) if type(result) in (list, tuple) else tuple(parts)
    return result


def writes(called: str, kwargs: Mapping[str, Any]) -> bool:
    """Whether a function of torch changes its first argument."""
    if called.startswith("__"):
        return called == "__setitem__" or (
            called.startswith("__i") and called not in ("__int__", "__index__", "__invert__")
        )
    return called.endswith("_") or kwargs.get("out") is not None
