"""The phases of a step add up to its time, in every engine; a moment that is planted lands where it belongs.

The bounds are wide, for the host may do other work: what was planted is a lower bound of its phase, and the others
have to stay below it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from models import MODELS
from rank_pool import RankPools
from torch import Tensor, nn

from trainfleet.batch import Batch
from trainfleet.deps import installed
from trainfleet.events import Event, RanksReported, StepEnded
from trainfleet.loss import LossSum
from trainfleet.mesh import Mesh
from trainfleet.monitor.history.ranks import Ranks
from trainfleet.parallel import make_engine, parallelize
from trainfleet.parallel.experts.layer import MixtureOfExperts
from trainfleet.plan import Plan
from trainfleet.stopwatch import PHASES, Stopwatch, timed
from trainfleet.training.recipe import TrainConfig
from trainfleet.training.trainer import Trainer

CASE = MODELS["transformer"]
NAP = 0.15


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.mixture, self.head = nn.Embedding(16, 8), MixtureOfExperts(8, 6, 4, top_k=2), nn.Linear(8, 16)

    def forward(self, tokens: Tensor) -> Any:
        return self.head(self.mixture(self.tokens(tokens)))


def mixed_loss(output: Tensor, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(output.flatten(0, 1), batch["input"].flatten())


class Planted:
    """Lets this rank sleep at one place of a step."""

    def __init__(self, loss_fn: Callable[[Any, Batch], Any]) -> None:
        self.where = ""
        self._loss_fn = loss_fn

    def nap(self, where: str) -> None:
        if self.where == where:
            self.where = ""  # once
            time.sleep(NAP)

    def prepare(self, batch: Batch) -> Batch:
        self.nap("transfer")
        return batch

    def loss(self, output: Any, batch: Batch) -> Any:
        self.nap("forward")
        loss = LossSum.of(self._loss_fn(output, batch))
        if loss.total.requires_grad:
            loss.total.register_hook(lambda gradient: self.nap("backward"))
        return loss


PLACES = ("transfer", "forward", "backward", "optimizer")


def steps_of(plan: Plan, mesh: Mesh) -> list[tuple[dict[str, float], float]]:
    """(phases, seconds) of a step as it is, and of one for each of PLACES in which the last rank sleeps."""
    model: nn.Module = Mixed() if plan.ep > 1 else CASE.build(0)
    batches: list[Any] = [CASE.micro_batch(0, i) for i in range(2)]
    if plan.ep > 1:
        batches = [{"input": torch.arange(12).view(2, 6) % 16}] * 2
    model = parallelize(model, mesh, plan, example=batches[0])
    planted = Planted(mixed_loss if plan.ep > 1 else CASE.loss_fn)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer.register_step_pre_hook(lambda *_: planted.nap("optimizer"))
    engine = make_engine(model, optimizer, planted.loss, prepare=planted.prepare)
    found = []
    with Stopwatch() as watch:
        for place in ("warm up", "as it is", *PLACES):
            planted.where = place if mesh.rank == mesh.world_size - 1 else ""
            mesh.world.barrier()
            watch.take()
            begun = time.perf_counter()
            engine.forward_backward(batches)
            engine.clip(1.0)
            engine.step()
            with timed("communication"):  # a rank hears of the other's late update only when it waits for it
                mesh.world.barrier()
            found.append((watch.take(), time.perf_counter() - begun))
    return found[1:]


def measured(plans: list[Plan]) -> list[list[tuple[dict[str, float], float]]]:
    torch.set_num_threads(1)
    found = []
    for plan in plans:
        with Mesh.from_env(plan) as mesh:
            found.append(steps_of(plan, mesh))
    return found


def hold(ranks: RankPools, plans: list[Plan]) -> None:
    first, last = ranks(2, measured, plans)
    for plan, waits, sleeps in zip(plans, first, last, strict=True):
        for steps in (waits, sleeps):
            whole = sum(seconds for _, seconds in steps)
            assert sum(sum(phases.values()) for phases, _ in steps) == pytest.approx(whole, rel=0.03), plan
            assert sum(phases["other"] for phases, _ in steps) < 0.03 * whole, (plan, steps)
            for phases, _ in steps:
                assert list(phases) == list(PHASES)
                assert min(phases[phase] for phase in ("forward", "backward", "optimizer")) > 0
        for place, (there, _), (here, _) in zip(PLACES, sleeps[1:], waits[1:]):
            assert there[place] >= 0.99 * NAP, (plan, place, there)
            assert here["communication"] >= 0.6 * NAP, (plan, place, here)
            assert here[place] < there[place], (plan, place, here)


def with_deepspeed(zero: int) -> Plan:
    return Plan(engine="deepspeed", engine_required=True, zero=zero)


DEEPSPEED = pytest.mark.skipif(installed("deepspeed") is None, reason="DeepSpeed is not installed")


def test_steps_of_replicated_and_sharded_models_are_counted_whole(ranks: RankPools) -> None:
    hold(ranks, [Plan(zero=zero) for zero in (0, 2, 3)])


def test_steps_of_models_in_pieces_are_counted_whole(ranks: RankPools) -> None:
    hold(ranks, [Plan(tp=2), Plan(cp=2), Plan(ep=2), Plan(pp=2)])


@DEEPSPEED
def test_steps_of_deepspeed_are_counted_whole(ranks: RankPools) -> None:
    hold(ranks, [with_deepspeed(3)])


@pytest.mark.matrix
@DEEPSPEED
def test_steps_of_the_other_engines_are_counted_whole(ranks: RankPools) -> None:
    hold(ranks, [Plan(zero=1), Plan(cp=2, cp_attention="all_to_all"), *map(with_deepspeed, (0, 1, 2))])


# ── a whole run ───────────────────────────────────────────────────────────────────────────────────────────────────


class Sleepy:
    """A stream that takes its time for the batch of one step."""

    def __init__(self, mesh: Mesh, at: int) -> None:
        self._mesh, self._at, self._given = mesh, at, 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self._given += 1
        if self._given == self._at and self._mesh.rank == self._mesh.world_size - 1:
            time.sleep(NAP)
        return CASE.micro_batch(0, self._given)


class Slow:
    """An observer that sleeps when it hears of one step, and keeps what it hears."""

    def __init__(self, at: int) -> None:
        self._at = at
        self.heard: list[Event] = []

    def on_event(self, event: Event) -> None:
        self.heard.append(event)
        if isinstance(event, StepEnded) and event.step == self._at:
            time.sleep(NAP)


def run(steps: int) -> tuple[list[StepEnded], list[RanksReported]]:
    torch.set_num_threads(1)
    with Mesh.from_env(Plan()) as mesh:
        model = parallelize(CASE.build(0), mesh, Plan())
        slow = Slow(at=4)

        def evaluation() -> Iterator[Batch]:
            time.sleep(NAP)
            yield CASE.micro_batch(0, 99)

        trainer = Trainer(
            model,
            torch.optim.AdamW(model.parameters(), lr=1e-3),
            CASE.loss_fn,
            Sleepy(mesh, at=3),
            mesh=mesh,
            config=TrainConfig(evaluate_every=5),
            evaluation=evaluation,
            observers=[slow],
            report_every=3,
        )
        trainer.fit(steps)
        ended = [event for event in slow.heard if isinstance(event, StepEnded)]
        return ended, [event for event in slow.heard if isinstance(event, RanksReported)]


def counted(plans: list[Plan]) -> list[list[tuple[int, int]]]:
    """(samples, tokens) of each step of a run under each plan."""
    torch.set_num_threads(1)
    found = []
    for plan in plans:
        with Mesh.from_env(plan) as mesh:
            model = parallelize(CASE.build(0), mesh, plan, example=CASE.micro_batch(0, 0))
            dealt = (CASE.micro_batch(0, i) for i in range(mesh.data_axes.rank, 99, mesh.data_axes.size))
            slow = Slow(at=0)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            accumulation = 4 // mesh.data_axes.size
            options: Any = {"mesh": mesh, "observers": [slow], "accumulation": accumulation}
            Trainer(model, optimizer, CASE.loss_fn, dealt, **options).fit(2)
            found.append([(event.samples, event.tokens) for event in slow.heard if isinstance(event, StepEnded)])
    return found


def test_samples_and_tokens_count_once_however_the_model_is_spread(ranks: RankPools) -> None:
    ((alone,),) = ranks(1, counted, [Plan()])
    assert all(tokens > samples for samples, tokens in alone)
    for found in ranks(2, counted, [Plan(), Plan(zero=2), Plan(tp=2), Plan(cp=2), Plan(pp=2)]):
        assert found == [alone] * 5


def held(step: StepEnded) -> Mapping[str, float]:
    """The phases, which add up to the time from the end of the step before to the end of this one."""
    # Between the two readings another process may have had the processor, whatever the step took.
    assert sum(step.phases.values()) == pytest.approx(step.between_seconds + step.seconds, rel=0.03, abs=0.02)
    return step.phases


def test_what_a_run_does_besides_is_counted_with_the_next_step(ranks: RankPools) -> None:
    for ended, _ in ranks(2, run, 6):
        by_step = {step.step: held(step) for step in ended}
        assert by_step[5]["observers"] >= 0.99 * NAP > by_step[4]["observers"]
        assert by_step[6]["evaluation"] >= 0.99 * NAP > by_step[5]["evaluation"]
        whole = sum(step.seconds + step.between_seconds for step in ended)
        assert sum(step.phases["other"] for step in ended) < 0.03 * whole


def test_a_slow_dataset_of_one_rank_is_waited_for_by_the_other_and_the_report_names_it(ranks: RankPools) -> None:
    (waits, (report, _)), (sleeps, _) = ranks(2, run, 6)
    assert sleeps[2].phases["data"] >= 0.99 * NAP > waits[2].phases["data"]
    assert sleeps[2].data_seconds == pytest.approx(sleeps[2].phases["data"], abs=0.01)
    assert waits[2].phases["communication"] >= 0.6 * NAP
    reported = Ranks()
    reported.add(report.ranks)
    assert [(slow.rank, slow.phase) for slow in reported.slow] == [(1, "data")]
