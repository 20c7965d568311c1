"""On a GPU: what is saved from it is copied into pinned memory and comes back."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from held import Held  # noqa: E402

from trainfleet.checkpoint import Checkpointer  # noqa: E402
from trainfleet.store import FileStore  # noqa: E402

pytestmark = [
    pytest.mark.device,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="saving from a GPU needs one"),
]


def test_a_state_on_the_gpu_comes_back_through_pinned_memory(tmp_path: Path) -> None:
    whole = torch.randn(1000, 1000, device="cuda")
    with Checkpointer(FileStore(tmp_path)) as checkpointer:
        checkpointer.prepare(m=Held(w=whole))
        staging = torch.frombuffer(checkpointer._memory.reserve(4_000_000), dtype=torch.float32)
        assert staging.is_pinned()
        del staging
        before = whole.clone()
        save = checkpointer.save(1, m=Held(w=whole))
        whole.zero_()
        save.wait()
    live = Held(w=torch.zeros(1000, 1000, device="cuda"))
    assert Checkpointer(FileStore(tmp_path)).restore(m=live) == 1
    assert live.value["w"].is_cuda and torch.equal(live.value["w"], before)
