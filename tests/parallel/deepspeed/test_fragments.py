"""Runs of elements become whole tensors, and whole tensors rows, without a bit changed."""

from __future__ import annotations

import numpy as np
import torch
from rank_pool import RankPools

from trainfleet.comm.threads import run_ranks
from trainfleet.mesh import Mesh
from trainfleet.parallel.deepspeed.fragments import rows, whole
from trainfleet.plan import Plan

ODD = [float("nan"), -0.0, float("inf"), 1e-45, -1.5, 3.0, -float("inf")]


def joined(dtype: torch.dtype) -> tuple[bytes, bytes]:
    with Mesh.from_env(Plan()) as mesh:
        values = torch.tensor(ODD).to(dtype)
        first, last = (0, 3) if mesh.rank == 0 else (3, 7)
        made = whole(values[first:last], first, (7, 1), dtype, mesh)
        return made.view(torch.uint8).numpy().tobytes(), values.view(torch.uint8).numpy().tobytes()


def test_runs_of_all_ranks_make_the_whole_to_the_bit(ranks: RankPools) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for found, expected in ranks(2, joined, dtype):
            assert found == expected


def test_rows_are_dealt_out_once_each() -> None:
    for length in (1, 2, 5, 8):
        dealt = run_ranks(3, lambda group, length=length: rows((length, 4), group))
        assert np.concatenate([np.arange(length)[part] for part in dealt]).tolist() == list(range(length))
