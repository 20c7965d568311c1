"""What context-parallel ranks exchange comes where it should, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from rank_pool import RankPools

from trainfleet.parallel.context.exchange import Passing, from_balanced, to_balanced, traded


def moved() -> dict[str, Any]:
    group = dist.group.WORLD
    assert group is not None
    rank, size = group.rank(), group.size()
    whole = torch.arange(2 * size * 3.0).view(1, 2 * size, 3)
    own = whole.chunk(size, -2)[rank].clone().requires_grad_()
    balanced, doubled = to_balanced([own, own * 2], group)
    back = from_balanced([balanced, doubled], group)
    (balanced * torch.arange(2.0)[:, None]).sum().backward()
    passed = Passing([torch.tensor([float(rank)]), torch.full((2, 2), rank + 0.5)], group).wait()
    heads = torch.arange(4.0 * size).view(1, size, 4, 1)  # a piece of 4 positions, `size` heads
    after = traded(heads + 100 * rank, group, cut=1, joined=2)
    return {
        "halves": (balanced[0, :, 0] / 3).tolist(),
        "doubled": torch.equal(doubled, balanced * 2),
        "back": torch.equal(back[0], own) and torch.equal(back[1], own * 2),
        "gradient": own.grad[0, :, 0].tolist(),
        "passed": [each.flatten().tolist() for each in passed],
        "traded": after.flatten().tolist(),
    }


def test_each_rank_gets_an_early_and_a_late_half_and_gives_them_back(ranks: RankPools) -> None:
    found = ranks(4, moved)
    assert [each["halves"] for each in found] == [[0, 7], [1, 6], [2, 5], [3, 4]]
    assert all(each["back"] and each["doubled"] for each in found)
    # The second half of each balanced pair counts once, the first not at all: halves 4 to 7.
    assert [each["gradient"] for each in found] == [[0, 0], [0, 0], [1, 1], [1, 1]]


def test_what_is_passed_on_goes_round_and_what_is_traded_is_joined_by_rank(ranks: RankPools) -> None:
    for rank, each in enumerate(ranks(4, moved)):
        before = (rank - 1) % 4
        assert each["passed"] == [[before], [before + 0.5] * 4]
        assert each["traded"] == [100 * source + 4 * rank + i for source in range(4) for i in range(4)]
