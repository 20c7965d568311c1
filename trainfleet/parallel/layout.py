"""Layout: over which axes of the mesh a tensor is split, and the piece of it that is here."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor

_OF_DATA = "dp_shard"


def axes_of(tensor: Tensor) -> tuple[str, ...]:
    """The axes that `tensor` lies on, split or copied; none where it is no DTensor.

    What lies on dp_shard lies on cp too, for that axis of `mesh.sharding` holds the ranks of both. The axes of experts
    that are dealt out, ep_replicate and ep, hold the ranks of dp_replicate, dp_shard and cp.
    """
    names = tuple(tensor.device_mesh.mesh_dim_names or ()) if isinstance(tensor, DTensor) else ()
    if "ep" in names:
        return (*names, "dp_replicate", _OF_DATA, "cp")
    return (*names, "cp") if _OF_DATA in names else names


def is_split_over(tensor: Tensor, axis: str) -> bool:
    """Whether the ranks of `axis` hold different parts of `tensor`."""
    if not isinstance(tensor, DTensor):
        return False
    return any(
        name == axis and not placement.is_replicate() for name, placement in zip(axes_of(tensor), tensor.placements)
    )


def is_sharded(tensor: Tensor) -> bool:
    """Whether `tensor` is in the care of FSDP2, which gathers it and scatters its gradient over data-parallel ranks."""
    return isinstance(tensor, DTensor) and _OF_DATA in (tensor.device_mesh.mesh_dim_names or ())


def piece_of(tensor: Tensor) -> Tensor:
    """This rank's piece, without a graph; a tensor that is no DTensor is its own."""
    own = tensor.detach()
    return own.to_local() if isinstance(own, DTensor) else own
