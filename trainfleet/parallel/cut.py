"""Cut a whole tensor to the piece that this rank keeps."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor

from trainfleet.parallel.torch_private import offsets_in_whole


def piece_like(whole: Tensor, like: Tensor) -> Tensor:
    """The part of `whole` that this rank holds of `like`: a view; all of it where `like` is no DTensor."""
    if not isinstance(like, DTensor):
        return whole
    shape = like.to_local().shape
    if not shape.numel():
        return whole.new_empty(shape)
    return whole[tuple(slice(offset, offset + size) for offset, size in zip(offsets_in_whole(like), shape))]
