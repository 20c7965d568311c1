"""Compiled blocks compute what the plain ones do. Long, for compiling takes its time."""

from __future__ import annotations

import shutil
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from models import MODELS  # noqa: E402
from rank_pool import RankPools  # noqa: E402

from trainfleet.mesh import Mesh  # noqa: E402
from trainfleet.plan import Plan  # noqa: E402
from trainfleet.training.proof.case import Case  # noqa: E402
from trainfleet.training.proof.trace import trace  # noqa: E402
from trainfleet.training.proof.verdict import compare  # noqa: E402


def build() -> Any:
    return MODELS["transformer"].build(0)


def micro_batch(number: int) -> Any:
    return MODELS["transformer"].micro_batch(0, number)


def adamw(model: Any) -> Any:
    return torch.optim.AdamW(model.parameters(), lr=5e-3)


def traced(plan: Plan) -> Any:
    case = Case(
        build=build, loss_fn=MODELS["transformer"].loss_fn, micro_batch=micro_batch, optimizer=adamw, accumulation=2
    )
    with Mesh.from_env(plan) as mesh:
        return trace(case, plan, mesh)


@pytest.mark.matrix
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("zero", [0, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_blocks_compute_the_same(ranks: RankPools, zero: int, precision: Any) -> None:
    plain = ranks(2, traced, Plan(zero=zero, precision=precision), deadline_seconds=300)[0]
    compiled = ranks(2, traced, Plan(zero=zero, precision=precision, compile=True), deadline_seconds=600)[0]
    verdict = compare(plain, compiled, precision)
    assert verdict.holds, str(verdict)
