"""Watchers see every step and may judge it: what they say is told, and done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from trainfleet.checkpoint import Checkpointer  # noqa: E402
from trainfleet.errors import TrainfleetError  # noqa: E402
from trainfleet.events import AnomalySeen, Event, RunEnded, StepEnded  # noqa: E402
from trainfleet.mesh import Mesh  # noqa: E402
from trainfleet.parallel import parallelize  # noqa: E402
from trainfleet.plan import Plan  # noqa: E402
from trainfleet.store import MemoryStore  # noqa: E402
from trainfleet.training.recipe import TrainConfig  # noqa: E402
from trainfleet.training.trainer import Trainer  # noqa: E402
from trainfleet.training.watchers.watcher import POLICIES, Judgement, UnderWay, Watcher, Watchers  # noqa: E402


class Judge(Watcher):
    """Judges the steps that it is told to, and writes down what it hears."""

    def __init__(self, **policies: str) -> None:
        self.policies = {int(step.removeprefix("step_")): policy for step, policy in policies.items()}
        self.heard: list[Any] = []

    def begin(self, step: int, micro_batches: Sequence[Any]) -> None:
        self.heard.append(("begin", step, len(micro_batches)))

    def judge(self, under_way: UnderWay) -> Judgement | None:
        self.heard.append(("judge", under_way.step))
        policy = self.policies.pop(under_way.step, None)
        return policy and Judgement(policy=policy, kind="loss_spike", what="It is too high", samples=[3])

    def end(self, ended: StepEnded) -> None:
        self.heard.append(("end", ended.step, ended.skipped))

    def close(self) -> None:
        self.heard.append("close")


def run(judge: Judge, *, steps: int = 3, store: MemoryStore | None = None) -> tuple[list[Event], Any]:
    told: list[Event] = []

    class Told:
        on_event = staticmethod(told.append)

    draw = torch.Generator().manual_seed(0)
    batches = [torch.randn(2, 3, generator=draw) for _ in range(8)]
    with Mesh.from_env(Plan(), device="cpu") as mesh:
        torch.manual_seed(0)
        model = parallelize(torch.nn.Linear(3, 3), mesh, Plan())
        trainer = Trainer(
            model,
            torch.optim.AdamW(model.parameters(), lr=0.1),
            lambda out, _: out.square().mean(),
            batches,
            mesh=mesh,
            config=TrainConfig(rollback_every=1),
            observers=[Told()],
            watchers=[judge],
            checkpointer=Checkpointer(store) if store is not None else None,
            save_every=100 if store is not None else None,
        )
        try:
            trainer.fit(steps)
        except TrainfleetError as error:
            return told, error
        return told, trainer


def test_a_watcher_sees_each_step_from_its_beginning() -> None:
    judge = Judge()
    run(judge, steps=2)
    steps = [[("begin", step, 1), ("judge", step), ("end", step, False)] for step in (1, 2)]
    assert judge.heard == [*steps[0], *steps[1], "close"]


def test_a_skipped_step_counts_and_updates_nothing() -> None:
    told, trainer = run(Judge(step_2="skip"), steps=2)
    _, after_one = run(Judge(), steps=1)
    assert [event.skipped for event in told if isinstance(event, StepEnded)] == [False, True]
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), after_one.model.parameters()))
    assert trainer.engine.steps == 2
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_a_rollback_takes_the_step_again() -> None:
    judge = Judge(step_2="rollback")
    _, trainer = run(judge, steps=2)
    assert trainer.step == 2
    assert [each[1] for each in judge.heard if each[0] == "begin"] == [1, 2, 2]


def test_a_stop_saves_the_state_before_the_update_and_ends_the_run() -> None:
    store = MemoryStore()
    told, error = run(Judge(step_3="stop"), store=store)
    assert "It is too high in step 3" in str(error)
    assert Checkpointer(store).steps() == [2]
    assert [event.reason for event in told if isinstance(event, RunEnded)] == [str(error)]


@pytest.mark.parametrize("policy", POLICIES[:3])
def test_what_is_seen_is_told(policy: str) -> None:
    told, _ = run(Judge(step_2=policy))
    (seen,) = [event for event in told if isinstance(event, AnomalySeen)]
    assert (seen.step, seen.kind, seen.what, seen.policy) == (2, "loss_spike", "It is too high", policy)
    assert seen.samples == [3]


def test_the_gravest_judgement_counts_and_all_are_told() -> None:
    told: list[Event] = []
    watchers = Watchers([Judge(step_1="warn"), Judge(step_1="rollback"), Judge(step_1="skip"), Judge()], told.append)
    under_way = UnderWay(step=1, micro_batches=[], engine=None, loss=1.0, grad_norm=1.0, loss_scale=None)  # type: ignore[arg-type]
    judgement = watchers.judge(under_way)
    assert judgement is not None and judgement.policy == "rollback"
    assert [event.policy for event in told if isinstance(event, AnomalySeen)] == ["warn", "rollback", "skip"]
    assert watchers.judge(under_way) is None
