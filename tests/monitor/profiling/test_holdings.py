"""What a block was for follows from where it was made and how long it lived."""

from __future__ import annotations

import pytest

from trainfleet.monitor.profiling.allocations import Block, Followed, Range
from trainfleet.monitor.profiling.holders import Held
from trainfleet.monitor.profiling.holdings import Look, end_unseen, holdings

PHASES = (Range("forward", 0, 100), Range("backward", 100, 200), Range("optimizer", 200, 300))
BACKWARD = "autograd::engine::evaluate_function: X"


def kind(made: int, freed: int | None, *ranges: str, looks: tuple[Look, ...] = ()) -> str:
    block = Block("cpu", 7, 64, made, freed, ranges)
    (found,) = holdings(Followed((block,), PHASES, (), ()), [], [Look(0, {}), *looks], end=300)
    return found.kind


@pytest.mark.parametrize(
    ("made", "freed", "ranges", "expected"),
    [
        (10, 150, ("module: a",), "activations"),
        (10, 150, (), "activations"),
        (10, 50, ("module: a",), "temporary"),
        (110, 150, (BACKWARD, "module: a"), "activations"),
        (110, 150, (BACKWARD,), "temporary"),
        (110, 250, (BACKWARD,), "gradients"),
        (210, 250, (), "temporary"),
        (10, 150, ("FSDP::all_gather_copy_out",), "gathered"),
        (10, 20, ("FSDP::all_gather",), "communication"),
        (110, 120, ("c10d::allreduce_",), "communication"),
    ],
)
def test_kinds(made: int, freed: int, ranges: tuple[str, ...], expected: str) -> None:
    assert kind(made, freed, *ranges) == expected


def test_a_holder_that_was_seen_while_the_block_lived_decides() -> None:
    held = Held("gradients", "cpu", 7, 60, (15,), (("a", 20), ("b", 40)))
    look = Look(200, {("cpu", 7): held})
    assert kind(110, 250, BACKWARD, looks=(look,)) == "gradients"
    assert kind(110, 150, BACKWARD, looks=(look,)) == "temporary"
    block = Block("cpu", 7, 64, 110)
    (found,) = holdings(Followed((block,), PHASES, (), ()), [], [Look(0, {}), look], end=300)
    assert found.parts == (("a", 24), ("b", 40))  # the allocator's rounding goes to the first


def test_memory_that_was_handed_over_ends_with_its_last_use_unless_it_is_found_later() -> None:
    used = Block("cpu", 7, 64, 110, handed_over=120, used=130)
    unused = Block("cpu", 8, 64, 110, handed_over=120)
    found = Block("cpu", 9, 64, 110, handed_over=120)
    seen = Block("cpu", 10, 64, 110, freed=190, handed_over=120, is_end_seen=True)
    held = Held("other", "cpu", 9, 64, (16,), (("", 64),))
    end_unseen(
        Followed((used, unused, found, seen), PHASES, (), (120, 160)), [Look(0, {}), Look(300, {("cpu", 9): held})]
    )
    assert [block.freed for block in (used, unused, found, seen)] == [130, 160, None, 190]
