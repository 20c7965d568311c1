"""A split layer around which sequences are in pieces: they are gathered for it, and scattered with its sums.

Korthikanti et al., arXiv:2205.05198, section 4.2.2. A sum over ranks costs a gathering and a scattering, so that norms,
dropout and residuals on pieces cost no more exchange than on the whole, but 1 / ranks of the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from trainfleet.batch import arrays, map_arrays
from trainfleet.comm.group import Group
from trainfleet.parallel.partition import kept_in_pieces
from trainfleet.parallel.tensor.exchange import gathered, placed
from trainfleet.parallel.tensor.functions import ASKED
from trainfleet.parallel.tensor.region import OnPieces, copied, writes

_LINEAR_VIEWS = ("view", "reshape", "unflatten")


class OnSequences(OnPieces):
    """Inside a split layer, where sequences of `length` are in pieces outside.

    Sums over ranks of [B, length, …] are scattered along the sequence. Of the flat [B x length, C] that some layers
    compute with, the sum waits until it has been given its dimensions again.
    """

    def __init__(self, name: str, mesh: DeviceMesh, said: set[str], length: int) -> None:
        super().__init__(name, mesh, said)
        self.mesh, self.length = mesh, length

    def compute(self, forward: Callable[..., Any], args: Any, kwargs: Any, keep_over: Group | None = None) -> Any:
        """`forward` of the gathered arguments; its output in pieces again.

        With `keep_over`, what backward needs of the gathered ones is kept in pieces over that Group.
        """
        args, kwargs = map_arrays(self._gathered, (args, kwargs))
        keeping: AbstractContextManager[Any] = nullcontext()
        if keep_over is not None:
            keeping = kept_in_pieces(arrays((args, kwargs)), keep_over)
        with keeping, self:
            output = forward(*args, **kwargs)
        return map_arrays(self._scattered, output)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        called = getattr(func, "__name__", str(func))
        if called not in _LINEAR_VIEWS and called not in ASKED:
            kwargs = dict(kwargs or {})
            if writes(called, kwargs) and _is_sum(args[0]):
                raise self._refusal(called)
            args, kwargs = map_arrays(_summed, (args, kwargs))
        return super().__torch_function__(func, types, args, kwargs)

    def _gathered(self, tensor: Any) -> Any:
        tensor = copied(self.mesh, tensor)
        return gathered(tensor) if isinstance(tensor, DTensor) else tensor

    def _scattered(self, tensor: Any) -> Any:
        return placed(tensor, self._for_sum(tensor)) if isinstance(tensor, DTensor) else tensor

    def _for_sum(self, tensor: DTensor) -> Placement:
        is_sequence = tensor.ndim > 1 and tensor.shape[1] == self.length
        return Shard(1) if is_sequence else Replicate()

    def _settled(self, tensor: Any) -> Any:
        is_flat = isinstance(tensor, DTensor) and tensor.ndim == 2 and tensor.shape[0] % self.length == 0
        return tensor if is_flat and tensor.placements[0].is_partial("sum") else super()._settled(tensor)


def _is_sum(tensor: Any) -> bool:
    return isinstance(tensor, DTensor) and tensor.placements[0].is_partial()


def _summed(tensor: Any) -> Any:
    return placed(tensor, Replicate()) if _is_sum(tensor) else tensor
