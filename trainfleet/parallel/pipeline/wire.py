"""Wire: the tensors that cross from one stage to the next, as one message of bytes.

One message for each micro-batch and boundary, whatever crosses: backends want equal dtypes and contiguous memory. A
message begins with the state of the random generator, or with a byte for each gradient that says whether there is one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trainfleet.errors import PlanError
from trainfleet.parallel.pipeline.graph import Kind

_ALIGNMENT = 16


class Message:
    """The layout of a message: a head of bytes, then tensors of `kinds`."""

    def __init__(self, kinds: Sequence[Kind], head_bytes: int = 0) -> None:
        self.kinds = list(kinds)
        self.head_bytes = head_bytes
        self._starts: list[int] = []
        end = _aligned(head_bytes)
        for kind in kinds:
            self._starts.append(end)
            end = _aligned(end + kind.num_bytes)
        self.num_bytes = end

    def empty(self, device: torch.device | str) -> Tensor:
        """Memory for one message, uint8 [num_bytes]."""
        return torch.empty(self.num_bytes, dtype=torch.uint8, device=device)

    @torch.no_grad()
    def packed(
        self, tensors: Sequence[Tensor | None], device: torch.device | str, head: Tensor | None = None
    ) -> Tensor:
        """Tensors as a message; zeros in place of None. PlanError where one is not of the kind that was agreed."""
        buffer = self.empty(device)
        if head is not None:
            buffer[: self.head_bytes].copy_(head)
        for part, kind, tensor in zip(self._parts(buffer), self.kinds, tensors, strict=True):
            if tensor is None:
                part.zero_()
                continue
            if tuple(tensor.shape) != kind.shape or tensor.dtype != kind.dtype:
                raise PlanError(
                    f"A stage of the pipeline made a tensor of {tensor.dtype} {list(tensor.shape)}, where the example "
                    f"says {kind.dtype} {list(kind.shape)}: its shape depends on more than the shapes of the input. "
                    "Set plan.pp to 1."
                )
            part.copy_(tensor)
        return buffer

    def unpacked(self, buffer: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The head and the tensors, which share the memory of `buffer`."""
        return buffer[: self.head_bytes], self._parts(buffer)

    def _parts(self, buffer: Tensor) -> list[Tensor]:
        return [
            buffer[start : start + kind.num_bytes].view(kind.dtype).view(kind.shape)
            for start, kind in zip(self._starts, self.kinds)
        ]


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
