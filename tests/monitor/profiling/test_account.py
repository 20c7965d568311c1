"""What was there before, and what becomes of it, is part of the account."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from trainfleet.monitor.profiling.account import Account  # noqa: E402
from trainfleet.monitor.profiling.allocations import Allocations  # noqa: E402


def test_what_was_there_ends_when_its_last_holder_lets_go_or_its_storage_is_emptied() -> None:
    gone, emptied, stays = torch.ones(50_000), torch.ones(60_000), torch.ones(70_000)
    account, allocations = Account(), Allocations()
    allocations.start()
    account.begin()
    del gone
    emptied.untyped_storage().resize_(0)
    account.end_step()
    report = account.report(allocations.stop())
    assert report.begin_bytes - report.end_bytes == pytest.approx(4 * 110_000, abs=10_000)
    assert report.end_bytes >= 4 * stays.numel()
