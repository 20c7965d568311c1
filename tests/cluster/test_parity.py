"""Every plan computes what one process computes: losses, gradient norms, and parameters after 20 optimizer steps.

`make test` runs a choice in which every pair of settings occurs; `make matrix` runs every cell.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

torch = pytest.importorskip("torch")

from models import MODELS  # noqa: E402
from rank_pool import RankPools  # noqa: E402

from trainfleet.mesh import Mesh  # noqa: E402
from trainfleet.parallel.blocks import find_blocks  # noqa: E402
from trainfleet.plan import LossScale, Plan  # noqa: E402
from trainfleet.training.proof.case import Case, comparable, together  # noqa: E402
from trainfleet.training.proof.trace import trace  # noqa: E402
from trainfleet.training.proof.verdict import CONCATENATED_SLACK, Trace, compare  # noqa: E402

STEPS = 20
DEADLINE_SECONDS = 900.0  # for forty cells, on a machine that does other things too


class Cell(NamedTuple):
    model: str
    zero: int
    precision: str
    accumulation: int
    recompute: str
    world_size: int

    def __str__(self) -> str:
        recompute = "-recompute" if self.recompute == "blocks" else ""
        return (
            f"{self.model}-zero{self.zero}-{self.precision}-x{self.accumulation}{recompute}-{self.world_size}processes"
        )


VALUES: tuple[tuple[Any, ...], ...] = (
    tuple(MODELS),
    (0, 1, 2, 3),
    ("fp32", "bf16", "fp16"),
    (1, 4),
    ("none", "blocks"),
    (1, 2, 4),
)
ALL = [Cell(*values) for values in itertools.product(*VALUES)]


def pairwise() -> list[Cell]:
    """A greedy choice of cells in which every pair of values of two settings occurs at least once."""
    chance = random.Random(0)
    wanted = {
        (i, a, j, b)
        for (i, first), (j, second) in itertools.combinations(enumerate(VALUES), 2)
        for a in first
        for b in second
    }
    chosen: list[Cell] = []
    while wanted:
        best = max(chance.sample(ALL, len(ALL)), key=lambda cell: len(wanted & _pairs(cell)))
        chosen.append(best)
        wanted -= _pairs(best)
    return chosen


def _pairs(cell: Cell) -> set[tuple[int, Any, int, Any]]:
    return {(i, a, j, b) for (i, a), (j, b) in itertools.combinations(enumerate(cell), 2)}


def build(model: str) -> Any:
    return MODELS[model].build(0)


def micro_batch(model: str, number: int) -> Any:
    return MODELS[model].micro_batch(0, number)


def adamw(model: Any) -> Any:
    return torch.optim.AdamW(model.parameters(), lr=5e-3)


def plan_of(cell: Cell) -> Plan:
    """With a loss scale at which nothing overflows where one process takes the batches of all ranks as one.

    It sums their gradients in fp16, the ranks sum theirs in float32: at the largest scale only the former overflows.
    """
    scale = LossScale(initial=1024.0) if cell.model == "convolutional" else LossScale()
    # Small models are one unit in stages 1 and 2 unless blocks are named; both ways are held.
    blocks = block_names(cell.model) if cell.zero in (1, 2) and cell.accumulation > 1 else ()
    return Plan(zero=cell.zero, precision=cell.precision, recompute=cell.recompute, loss_scale=scale, blocks=blocks)


@functools.cache
def block_names(model: str) -> tuple[str, ...]:
    built = build(model)
    blocks = find_blocks(built)
    return tuple(name for name, module in built.named_modules() if module in blocks)


def case_of(cell: Cell) -> Case:
    return Case(
        build=functools.partial(build, cell.model),
        loss_fn=MODELS[cell.model].loss_fn,
        micro_batch=functools.partial(micro_batch, cell.model),
        optimizer=adamw,
        steps=STEPS,
        accumulation=cell.accumulation,
        keep_gradients=False,
        only_last=True,
    )


def traces(cells: list[Cell]) -> list[Trace]:
    """On the ranks: what each cell computes."""
    found = []
    for cell in cells:
        plan = plan_of(cell)
        with Mesh.from_env(plan) as mesh:
            found.append(trace(case_of(cell), plan, mesh))
    return found if torch.distributed.get_rank() == 0 else []


def reference_traces(cells: list[Cell]) -> list[Trace]:
    """On one rank: the same work of one process, without sharding or recomputation."""
    found = []
    for cell in cells:
        plan = plan_of(cell._replace(zero=0, recompute="none"))
        with Mesh.from_env(plan) as mesh:
            found.append(trace(together(comparable(case_of(cell), plan)[0], cell.world_size), plan, mesh))
    return found


def compared(ranks: RankPools, cells: list[Cell]) -> Iterator[tuple[Cell, Any]]:
    for cell_group in _groups(cells):
        size = cell_group[0].world_size
        same_work = {cell: cell._replace(zero=0, recompute="none") for cell in cell_group}
        distinct = sorted(set(same_work.values()))
        references = dict(zip(distinct, ranks(1, reference_traces, distinct, deadline_seconds=DEADLINE_SECONDS)[0]))
        for cell, found in zip(cell_group, ranks(size, traces, cell_group, deadline_seconds=DEADLINE_SECONDS)[0]):
            slack = CONCATENATED_SLACK[cell.precision] if cell.model == "convolutional" and size > 1 else 1.0
            yield cell, compare(references[same_work[cell]], found, cell.precision, slack=slack)


def _groups(cells: list[Cell], most: int = 40) -> Iterator[list[Cell]]:
    """Cells of one world size, few enough for the deadline of a pool."""
    for _, group in itertools.groupby(sorted(cells, key=lambda cell: cell.world_size), lambda cell: cell.world_size):
        members = list(group)
        for start in range(0, len(members), most):
            yield members[start : start + most]


def check(ranks: RankPools, cells: list[Cell]) -> None:
    wrong = [f"{cell}: {verdict}" for cell, verdict in compared(ranks, cells) if not verdict.holds]
    assert not wrong, "\n".join(wrong)


def test_a_choice_with_every_pair_of_settings_equals_one_process(ranks: RankPools) -> None:
    check(ranks, pairwise())


@pytest.mark.matrix
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("model", MODELS)
def test_every_cell_of_a_model_equals_one_process(ranks: RankPools, model: str) -> None:
    check(ranks, [cell for cell in ALL if cell.model == model])


def test_the_choice_is_small_and_complete() -> None:
    chosen = pairwise()
    assert len(chosen) < 40
    for i, values in enumerate(VALUES):
        assert {cell[i] for cell in chosen} == set(values)
