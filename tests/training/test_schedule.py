"""Schedules are pure functions of the step."""

from __future__ import annotations

import itertools
import math

import pytest

from trainfleet.errors import ConfigError
from trainfleet.training.schedule import SHAPES, Rates, ScheduleConfig, multiple


def test_warmup_rises_in_a_straight_line_to_the_base_rate() -> None:
    config = ScheduleConfig(name="cosine", warmup_steps=10)
    assert [multiple(config, step, 100) for step in (1, 5, 10)] == [0.1, 0.5, 1.0]


def test_cosine_is_half_way_between_the_ends_in_the_middle() -> None:
    config = ScheduleConfig(name="cosine", final=0.2)
    assert multiple(config, 50, 100) == pytest.approx(0.6)
    assert multiple(config, 25, 100) == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 4)))


@pytest.mark.parametrize("name", ["linear", "cosine", "wsd"])
def test_the_last_step_has_the_final_multiple(name: str) -> None:
    assert multiple(ScheduleConfig(name=name, final=0.05, warmup_steps=7), 100, 100) == pytest.approx(0.05)


def test_wsd_is_stable_until_its_last_part() -> None:
    config = ScheduleConfig(name="wsd", decay_fraction=0.25, final=0.0)
    assert [multiple(config, step, 100) for step in (1, 50, 75)] == [1.0, 1.0, 1.0]
    assert multiple(config, 88, 100) == pytest.approx(0.48)


@pytest.mark.parametrize("name", SHAPES)
def test_after_warmup_the_rate_never_rises(name: str) -> None:
    config = ScheduleConfig(name=name, warmup_steps=3)
    rates = [multiple(config, step, 40) for step in range(3, 41)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates))


def test_a_schedule_may_be_a_function_of_the_users_own() -> None:
    assert multiple(ScheduleConfig(name=f"{__name__}:half"), 3, 10) == 0.5


def half(step: int, steps: int) -> float:
    return 0.5


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": "cosin"}, "schedule.name is 'cosin'"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"final": 2.0}, "final is 2.0"),
        ({"decay_fraction": 0.0}, "decay_fraction is 0.0"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ScheduleConfig(**settings)  # type: ignore[arg-type]


def test_rates_of_all_groups_are_multiples_of_what_they_began_with() -> None:
    torch = pytest.importorskip("torch")
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": [each], "lr": rate} for each, rate in zip(parameters, (1.0, 0.5))]
    optimizer = torch.optim.SGD(groups, lr=9.0)
    rates = Rates(optimizer, ScheduleConfig(name="linear", warmup_steps=4, final=0.0))
    assert rates.set(2, 100) == 0.5
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.25]
    assert rates.set(100, 100) == 0.0
