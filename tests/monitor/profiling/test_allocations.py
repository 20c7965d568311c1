"""What allocators give out is seen whole: inside of operators, by range, from beginning to end."""

from __future__ import annotations

import itertools

import pytest

torch = pytest.importorskip("torch")

from torch.autograd.profiler import record_function  # noqa: E402

from trainfleet.monitor.profiling.allocations import MODULE, PHASE, Allocations, Followed  # noqa: E402

SIZE = 40_000


def followed(work) -> Followed:
    allocations = Allocations()
    allocations.start()
    try:
        work()
    finally:
        seen = allocations.stop()
    return seen


def test_a_block_knows_its_size_its_ranges_and_its_life() -> None:
    kept = []

    def work() -> None:
        with record_function(PHASE + "forward"), record_function(MODULE + "head"):
            short = torch.ones(SIZE)
            kept.append((short * 2).reshape(100, -1).exp())
        del short

    blocks = [block for block in followed(work).blocks if block.size_bytes == 4 * SIZE]
    assert [block.freed is None for block in blocks] == [False, False, True]
    assert [block.operator for block in blocks] == ["aten::ones", "aten::mul", "aten::exp"]
    assert {block.module for block in blocks} == {"head"}
    assert blocks[0].shape == (SIZE,)
    assert all(block.is_end_seen for block in blocks[:2]) and blocks[0].made < blocks[1].made


def test_marked_phases_belong_to_the_innermost_and_leave_no_room_between() -> None:
    def work() -> None:
        with record_function(PHASE + "backward"):
            with record_function(PHASE + "communication"):
                torch.ones(3)
            torch.ones(3)

    phases = followed(work).phases
    assert [phase.name for phase in phases] == ["backward", "communication", "backward"]
    assert all(before.ended == after.begun for before, after in itertools.pairwise(phases))


def test_without_marks_the_phases_show_in_what_torch_ran() -> None:
    layer = torch.nn.Linear(3, 3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)

    def work() -> None:
        for _ in range(2):
            with record_function(MODULE):
                loss = layer(torch.ones(2, 3)).sum()
            loss.backward()
        optimizer.step()

    names = [phase.name for phase in followed(work).phases]
    assert names == ["forward", "backward", "forward", "backward", "other", "optimizer"]


def test_a_recomputation_inside_of_backward_is_told_from_a_forward() -> None:
    layer = torch.nn.Linear(3, 3)

    def forward(x: torch.Tensor) -> torch.Tensor:
        with record_function(MODULE + "block"):
            return layer(x).exp()

    def work() -> None:
        torch.utils.checkpoint.checkpoint(forward, torch.ones(2, 3), use_reentrant=False).sum().backward()

    made = [block for block in followed(work).blocks if block.module == "block"]
    assert {block.is_of_backward for block in made} == {True, False}
