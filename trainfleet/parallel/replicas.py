"""Replicas: copies of a parameter on several ranks must stay equal to the bit; a digest of each tells."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainfleet.comm.group import Group
from trainfleet.errors import ReplicasDiffer
from trainfleet.parallel.spread import spread_of

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """`shape:dtype digest` of each tensor's bits, computed where the tensor is."""
    return {name: f"{tuple(t.shape)}:{t.dtype} {_digest(t):016x}".replace(", ", ",") for name, t in tensors.items()}


def _digest(tensor: Tensor) -> int:
    """Sum of words times odd position weights modulo 2^64: any single changed, swapped or shifted word shows."""
    if tensor.is_meta or tensor.numel() == 0:
        return 0
    flat = tensor.detach().contiguous().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    words = flat.view(_WORDS[flat.element_size()]).to(torch.int64)
    positions = torch.arange(words.numel(), device=words.device, dtype=torch.int64)
    weights = positions * 0x5851F42D4C957F2D | 1
    return int((words * weights).sum().item()) & ((1 << 64) - 1)


def check_replicas(model: nn.Module) -> None:
    """Compare the copies of every parameter; a collective over all ranks.

    Raises ReplicasDiffer on every rank, naming the tensor and the ranks in the minority.
    """
    spread = spread_of(model)
    named = dict(model.named_parameters())
    pieces = {n: p.to_local() for n, p in named.items() if isinstance(p, DTensor)}
    whole = {n: p for n, p in named.items() if not isinstance(p, DTensor)}
    problems = [
        *_differences(digests(whole), spread.mesh.data_axes),
        *_differences(digests(pieces), spread.mesh["dp_replicate"]),
    ]
    # A rank whose own replicas agree must hear of those that do not, or it would wait for its peers for ever.
    problems = [problem for each in spread.mesh.data_axes.exchange(problems) for problem in each]
    if problems:
        raise ReplicasDiffer(
            f"{problems[0]} Copies that were equal have come apart.",
            hint="Look for code that runs on some ranks only, for a faulty memory or GPU; "
            "resume from the last checkpoint, which holds rank 0's copy.",
        )


def _differences(mine: dict[str, str], group: Group) -> list[str]:
    if group.size == 1:
        return []
    theirs = group.exchange(mine)
    for name in mine:
        found = [each[name] for each in theirs]
        if len(set(found)) > 1:
            usual, _ = Counter(found).most_common(1)[0]
            odd = [str(rank) for rank, digest in enumerate(found) if digest != usual]
            return [f"Parameter {name} differs on rank {', '.join(odd)} of {group.size} replicas."]
    return []
