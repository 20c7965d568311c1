"""The pool that other tests stand on: results by rank, failures with their rank, no waiting for ever."""

from __future__ import annotations

import os
import time

import pytest

torch = pytest.importorskip("torch", reason="several ranks need torch")
import torch.distributed as dist  # noqa: E402


class OwnError(Exception):
    pass


def total(value: float) -> tuple[int, float]:
    tensor = torch.tensor([value * dist.get_rank()])
    dist.all_reduce(tensor)
    return dist.get_rank(), tensor.item()


def fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise OwnError(f"told to by {rank}")
    dist.barrier()


def sleep_on(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(60)


def die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os._exit(7)


def draw() -> float:
    os.environ["LEFT_BEHIND"] = "1"
    return torch.rand(()).item()


def left_behind() -> bool:
    return "LEFT_BEHIND" in os.environ


def pid() -> int:
    return os.getpid()


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_results_come_back_by_rank(ranks, size):
    assert ranks(size, total, 2.0) == [(rank, 2.0 * sum(range(size))) for rank in range(size)]


def test_a_failing_rank_raises_its_own_error_with_its_traceback_and_the_pool_recovers(ranks):
    with pytest.raises(OwnError, match="told to by 1") as caught:
        ranks(2, fail_on, 1)
    assert "Rank 1 of 2" in str(caught.value.__cause__)
    assert "in fail_on" in str(caught.value.__cause__)
    assert ranks(2, total, 1.0) == [(0, 1.0), (1, 1.0)]


def test_a_late_rank_is_named_with_its_stack(ranks):
    with pytest.raises(TimeoutError, match=r"Ranks \[0\] of 2") as caught:
        ranks(2, sleep_on, 0, deadline_seconds=0.5)
    assert "in sleep_on" in str(caught.value)


def test_a_dead_rank_is_named(ranks):
    with pytest.raises(RuntimeError, match="Rank 1 of 2 died with exit code 7"):
        ranks(2, die_on, 1)


def test_calls_leave_no_trace_in_seeds_or_environment(ranks):
    assert ranks(2, draw) == ranks(2, draw)
    assert ranks(2, left_behind) == [False, False]


def test_processes_stay_between_calls(ranks):
    assert ranks(2, pid) == ranks(2, pid)
