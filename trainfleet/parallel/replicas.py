"""Replicas: copies of a parameter on several ranks must stay equal to the bit; a digest of each tells."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainfleet.comm.group import Group
from trainfleet.errors import ReplicasDiffer
from trainfleet.parallel.layout import is_sharded, is_split_over
from trainfleet.parallel.spread import spread_of

_WORDS = {1: torch.uint8, 2: torch.int16}
_CHUNK = 1 << 22  # words at a time: what the sums need beside the tensor stays below 100 MiB


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """A digest of each tensor's bits, computed where the tensor is: any changed, swapped or shifted number shows."""
    if not tensors:
        return {}
    with torch.no_grad():
        sums = [_digest(tensor) for tensor in tensors.values()]
        numbers = torch.stack([each.to(sums[0].device) for each in sums]).tolist()  # waits for the device once
    return {name: f"{number & ((1 << 64) - 1):016x}" for name, number in zip(tensors, numbers)}


def _digest(tensor: Tensor) -> Tensor:
    """Sum of words times odd weights by position, modulo 2^64.

    A word times an odd number tells the word. Words have 32 bits at most, or the swap of two that differ in their
    upper bits only could be lost where their weights differ in few.
    """
    total = torch.zeros((), dtype=torch.int64, device="cpu" if tensor.is_meta else tensor.device)
    if tensor.is_meta or tensor.numel() == 0:
        return total
    words = tensor.detach().reshape(-1)
    if words.is_complex():
        words = torch.view_as_real(words).reshape(-1)
    words = words.view(_WORDS.get(words.element_size(), torch.int32))
    for start in range(0, len(words), _CHUNK):
        chunk = words[start : start + _CHUNK].to(torch.int64)
        positions = torch.arange(start, start + len(chunk), device=words.device)
        total += (chunk * (positions * 0x5851F42D4C957F2D | 1)).sum()
    return total


def check_replicas(model: nn.Module) -> None:
    """Compare the copies of every parameter; a collective over all ranks.

    Raises ReplicasDiffer on every rank, naming the first tensor that differs and the ranks in the minority.
    """
    spread = spread_of(model)
    spread.rest()
    mesh = spread.mesh
    named = dict(model.named_parameters())
    pieces = {name: p.to_local() if isinstance(p, DTensor) else p for name, p in named.items()}
    sharded = {name: piece for name, piece in pieces.items() if is_sharded(named[name])}
    experts = {name: piece for name, piece in pieces.items() if is_split_over(named[name], "ep")}
    whole = {name: piece for name, piece in pieces.items() if name not in sharded and name not in experts}
    found = [
        _difference(whole, mesh.gradient_axes, mesh.rank),
        _difference(sharded, mesh["dp_replicate"], mesh.rank),
    ]
    if mesh.experts is not None:
        found.append(_difference(experts, mesh["ep_replicate"], mesh.rank))
    if "tp" in mesh.plan_axes:
        copied = {name: piece for name, piece in pieces.items() if not is_split_over(named[name], "tp")}
        found.append(_difference(copied, mesh["tp"], mesh.rank))
    if spread.pipeline is not None:
        tied = {name: piece for name, piece in pieces.items() if name in spread.pipeline.tied()}
        found.append(_difference(tied, mesh["pp"], mesh.rank, some_have_none=True))
    problem = next((each for each in found if each), None)
    # A rank whose own replicas agree must hear of those that do not, or it would wait for its peers for ever.
    problems = [each for each in mesh.world.exchange(problem) if each]
    if problems:
        raise ReplicasDiffer(
            f"{problems[0]} Copies that were equal have come apart.",
            hint="Look for code that runs on some ranks only, for a faulty memory or GPU; "
            "resume from the last checkpoint.",
        )


def _difference(tensors: Mapping[str, Tensor], group: Group, rank: int, *, some_have_none: bool = False) -> str | None:
    """The first of `tensors` that differs between those members of `group` that have it."""
    if group.size == 1 or not (tensors or some_have_none):
        return None
    theirs = group.exchange({"rank": rank, "digests": digests(tensors)})
    for name in tensors:
        ranks_of: dict[str, list[int]] = {}
        for each in theirs:
            if name in each["digests"]:
                ranks_of.setdefault(each["digests"][name], []).append(each["rank"])
        if len(ranks_of) > 1:
            return _said(name, list(ranks_of.values()))
    return None


def _said(name: str, camps: list[list[int]]) -> str:
    most = max(camps, key=len)
    if 2 * len(most) <= sum(map(len, camps)):
        ranks = " and ".join(_listed(camp) for camp in camps)
        return f"Parameter {name} differs between {ranks}."
    odd = sorted(rank for camp in camps if camp is not most for rank in camp)
    return f"Parameter {name} on {_listed(odd)} differs from that on the other {len(most)} ranks."


def _listed(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
