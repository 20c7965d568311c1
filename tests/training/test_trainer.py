"""The Trainer takes the steps of a hand-written loop, tells what happened, and goes on where it was."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from models import MODELS  # noqa: E402
from rank_pool import RankPools  # noqa: E402

from trainfleet.checkpoint import Checkpointer  # noqa: E402
from trainfleet.errors import ConfigError, DataError, NotSaved, StoreError  # noqa: E402
from trainfleet.events import (  # noqa: E402
    CheckpointFailed,
    CheckpointSaved,
    Evaluated,
    Event,
    Restored,
    RunEnded,
    RunStarted,
    StepEnded,
    Tracked,
)
from trainfleet.mesh import Mesh  # noqa: E402
from trainfleet.parallel import parallelize  # noqa: E402
from trainfleet.plan import Plan  # noqa: E402
from trainfleet.store import FileStore, MemoryStore, Store  # noqa: E402
from trainfleet.tracks import track  # noqa: E402
from trainfleet.training.recipe import TrainConfig  # noqa: E402
from trainfleet.training.schedule import ScheduleConfig  # noqa: E402
from trainfleet.training.trainer import Trainer  # noqa: E402

CASE = MODELS["transformer"]


class Stream:
    """Micro-batches of this rank, with a position."""

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.rank, self.world_size, self.position = rank, world_size, 0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        number = self.position + self.rank
        self.position += self.world_size
        return CASE.micro_batch(0, number)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: Any) -> None:
        self.position = state["position"]


class Heard:
    def __init__(self) -> None:
        self.events: list[Event] = []

    def on_event(self, event: Event) -> None:
        self.events.append(event)

    def of(self, kind: type[Event]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


def trainer_of(mesh: Mesh, plan: Plan, store: Store | None = None, **options: Any) -> tuple[Trainer, Heard]:
    heard = Heard()
    model = parallelize(CASE.build(0, dropout=0.1), mesh, plan)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    config = TrainConfig(**options.pop("config", {}))
    schedule = options.pop("schedule", ScheduleConfig(warmup_steps=3))
    checkpointer = Checkpointer(store, group=mesh.data_axes) if store is not None else None
    stream = options.pop("stream", None) or Stream(mesh.rank, mesh.world_size)
    trainer = Trainer(
        model,
        optimizer,
        CASE.loss_fn,
        stream,
        mesh=mesh,
        config=config,
        accumulation=2,
        schedule=schedule,
        checkpointer=checkpointer,
        save_every=4 if store is not None else None,
        observers=[heard],
        **options,
    )
    return trainer, heard


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    with Mesh.from_env() as mesh:
        yield mesh


def held_out() -> list[Any]:
    return [CASE.micro_batch(9, number) for number in range(3)]


def test_the_events_of_a_run_tell_its_story(mesh: Mesh) -> None:
    trainer, heard = trainer_of(mesh, Plan(), MemoryStore(), config={"evaluate_every": 4}, evaluation=held_out)
    outcome = trainer.fit(6)
    assert (outcome.step, outcome.reason) == (6, "finished")
    assert [type(event) for event in heard.events[:2]] == [RunStarted, StepEnded]
    assert [event.step for event in heard.of(StepEnded)] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in heard.of(Evaluated)] == [4, 6], "and at the end"
    assert [event.step for event in heard.of(CheckpointSaved)] == [4, 6], "and at the end"
    assert heard.of(RunEnded)[0].reason == "finished"
    assert heard.events[-1] is heard.of(RunEnded)[0]
    assert heard.of(StepEnded)[0].learning_rate == pytest.approx(1e-2 / 3)
    assert outcome.evaluation == heard.of(Evaluated)[-1].loss


def test_a_run_equals_a_hand_written_loop(mesh: Mesh) -> None:
    trainer, heard = trainer_of(mesh, Plan(), config={"clip_norm": None})
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    trainer.fit(5)

    model = CASE.build(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = ScheduleConfig(warmup_steps=3)
    from trainfleet.training.schedule import multiple

    for step in range(5):
        optimizer.param_groups[0]["lr"] = 1e-2 * multiple(schedule, step + 1, 5)
        losses = [CASE.loss_fn(model(b["input"]), b) for b in (CASE.micro_batch(0, 2 * step + i) for i in (0, 1))]
        loss = sum(each.total for each in losses) / sum(each.weight for each in losses)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert heard.of(StepEnded)[step].loss == pytest.approx(loss.item(), rel=1e-5)
    for ours, theirs in zip(trainer.model.parameters(), model.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def resumed_losses(folder: str, zero: int, precision: str) -> tuple[list[float], list[float], Any]:
    """The losses of steps 5 to 8, once in one go and once after a resume."""
    plan = Plan(zero=zero, precision=precision)
    options: dict[str, Any] = {"config": {"ema_decay": 0.9}, "schedule": ScheduleConfig(name="constant")}
    with Mesh.from_env(plan) as mesh:
        whole, heard = trainer_of(mesh, plan, **options)
        whole.fit(8)
        first, _ = trainer_of(mesh, plan, FileStore(folder), **options)
        first.fit(4)
        assert first._saves is not None
        first._saves.checkpointer.close()  # or its hold would keep the second one out
        second, again = trainer_of(mesh, plan, FileStore(folder), **options)
        restored = second.restore()
        second.fit(8)
        return (
            [event.loss for event in heard.of(StepEnded)[4:]],
            [event.loss for event in again.of(StepEnded)],
            (restored, len(again.of(Restored))),
        )


@pytest.mark.parametrize(("zero", "precision"), [(0, "fp32"), (2, "fp16"), (3, "bf16")])
def test_a_resumed_run_goes_on_to_the_bit(ranks: RankPools, tmp_path: Any, zero: int, precision: str) -> None:
    for uninterrupted, resumed, how in ranks(2, resumed_losses, str(tmp_path), zero, precision):
        assert how == (4, 1)
        assert resumed == uninterrupted


def test_early_stopping_ends_after_evaluations_without_gain(mesh: Mesh) -> None:
    worse = iter(range(100))

    class Engine:  # whose evaluations only get worse
        def __init__(self, engine: Any) -> None:
            self._engine = engine

        def __getattr__(self, name: str) -> Any:
            return getattr(self._engine, name)

        def evaluate(self, batches: Any) -> Any:
            from trainfleet.loss import LossSum

            return LossSum(float(next(worse)), 1.0)

    trainer, _ = trainer_of(mesh, Plan(), config={"evaluate_every": 1, "early_stopping": 2}, evaluation=held_out)
    trainer.engine = Engine(trainer.engine)  # type: ignore[assignment]
    outcome = trainer.fit(10)
    assert (outcome.step, outcome.reason) == (3, "stopped early")


def test_sigterm_saves_and_ends(mesh: Mesh) -> None:
    store = MemoryStore()

    class Killer(Stream):
        def __next__(self) -> Any:
            if self.position == 4:  # the first micro-batch of the third step
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__next__()

    trainer, heard = trainer_of(mesh, Plan(), store, stream=Killer())
    outcome = trainer.fit(10)
    assert (outcome.step, outcome.reason) == (3, "interrupted")
    assert Checkpointer(store).steps() == [3]
    assert heard.of(RunEnded)[0].reason == "interrupted"


class Filling(MemoryStore):
    """Takes nothing for the first so many writes, and then everything; or the other way round."""

    def __init__(self, num_writes: int, *, fails_first: bool) -> None:
        super().__init__()
        self.left, self.fails_first = num_writes, fails_first

    def put(self, *args: Any, **kwargs: Any) -> Any:
        self.left -= 1
        if (self.left >= 0) == self.fails_first:
            raise StoreError("The disk is full.", hint="Make room.")
        return super().put(*args, **kwargs)


def test_a_failed_save_is_told_and_training_goes_on(mesh: Mesh) -> None:
    trainer, heard = trainer_of(mesh, Plan(), Filling(1, fails_first=True))
    assert trainer.fit(6).reason == "finished"
    assert [event.step for event in heard.of(CheckpointFailed)] == [4]
    assert "full" in heard.of(CheckpointFailed)[0].reason


def test_a_run_whose_last_save_fails_ends_with_an_error_that_names_the_newest_checkpoint(mesh: Mesh) -> None:
    writes_of_a_save = 3  # data, index, manifest
    trainer, heard = trainer_of(mesh, Plan(), Filling(writes_of_a_save, fails_first=False))
    with pytest.raises(NotSaved, match=r"ended after step 6, but .* full.* newest one is that of step 4") as failed:
        trainer.fit(6)
    assert failed.value.hint == "Make room."
    assert [event.step for event in heard.of(CheckpointFailed)] == [6]
    assert "its last checkpoint failed" in heard.of(RunEnded)[0].reason


def test_a_run_that_saved_nothing_says_so(mesh: Mesh) -> None:
    trainer, _ = trainer_of(mesh, Plan(), Filling(99, fails_first=True))
    with pytest.raises(NotSaved, match="nothing of this run is saved"):
        trainer.fit(6)


def test_a_run_that_fails_otherwise_ends_with_that_error(mesh: Mesh) -> None:
    trainer, _ = trainer_of(mesh, Plan(), Filling(99, fails_first=True), stream=iter([]))
    with pytest.raises(DataError, match="came to an end"):
        trainer.fit(6)


def tracked(plan: Plan) -> list[tuple[int, str, float]]:
    with Mesh.from_env(plan) as mesh:
        stream = Stream(mesh.data_axes.rank, mesh.data_axes.size)
        trainer, heard = trainer_of(mesh, plan, stream=stream, report_every=2, evaluation=held_out)
        loss_fn = trainer.engine.loss_fn  # type: ignore[attr-defined]

        def telling(output: Any, batch: Any) -> Any:
            track("micro-batches", 1, reduce="sum")
            track("step", trainer.step + 1, reduce="max")
            return loss_fn(output, batch)

        trainer.engine.loss_fn = telling  # type: ignore[attr-defined]
        trainer.fit(3)
        told = [(event.step, event.name, event.value) for event in heard.of(Tracked)]
        return [*told, *((-1, *item) for event in heard.of(Evaluated) for item in event.metrics.items())]


def test_what_is_tracked_is_told_with_the_reports_and_that_of_an_evaluation_with_it(ranks: RankPools) -> None:
    told = [(2, "micro-batches", 4.0), (2, "step", 2.0), (3, "micro-batches", 2.0), (3, "step", 3.0)]
    expected = [*told, (-1, "micro-batches", 3.0), (-1, "step", 4.0)]
    assert tracked(Plan()) == expected
    assert ranks(2, tracked, Plan(tp=2)) == [expected] * 2  # tensor-parallel ranks see the same data, and count once


def test_the_average_of_the_weights_is_what_is_evaluated(mesh: Mesh) -> None:
    trainer, heard = trainer_of(mesh, Plan(), config={"ema_decay": 0.5}, evaluation=held_out)
    trainer.fit(3)
    assert trainer.ema is not None
    with trainer.ema.applied():
        averaged = trainer.engine.evaluate(held_out()).mean
    assert heard.of(Evaluated)[-1].loss == averaged
    assert averaged != trainer.engine.evaluate(held_out()).mean


def test_a_stream_that_ends_too_early_is_a_sentence(mesh: Mesh) -> None:
    trainer, heard = trainer_of(mesh, Plan(), stream=iter([CASE.micro_batch(0, 0)] * 3))
    with pytest.raises(DataError, match="came to an end after step 1"):
        trainer.fit(5)
    assert "came to an end" in heard.of(RunEnded)[0].reason


def test_evaluations_without_anything_to_evaluate_are_refused(mesh: Mesh) -> None:
    with pytest.raises(ConfigError, match="nothing to evaluate on"):
        trainer_of(mesh, Plan(), config={"evaluate_every": 5})


def test_a_step_function_of_the_users_own_takes_the_place_of_the_engines(mesh: Mesh) -> None:
    calls: list[int] = []

    def step(engine: Any, micro_batches: Any) -> Any:
        calls.append(len(micro_batches))
        return engine.forward_backward(micro_batches)

    trainer, _ = trainer_of(mesh, Plan(), step_fn=step)
    trainer.fit(2)
    assert calls == [2, 2]


def test_epochs_of_a_stream_that_does_not_know_them_are_no_time_to_evaluate(mesh: Mesh) -> None:
    with pytest.raises(ConfigError, match="does not know where its epochs end"):
        trainer_of(
            mesh,
            Plan(),
            stream=iter([CASE.micro_batch(0, 0)] * 3),
            config={"evaluate_every": "epoch"},
            evaluation=lambda: [CASE.micro_batch(0, 0)],
        )
