from __future__ import annotations

import pytest

from trainfleet.errors import ConfigError
from trainfleet.monitor import MonitorConfig
from trainfleet.monitor.profiling.step_range import MemoryConfig, ProfileConfig, StepRange


@pytest.mark.parametrize(("given", "first", "last"), [(3, 3, 3), ("3", 3, 3), ("10-12", 10, 12), (" 1 - 2 ", 1, 2)])
def test_a_step_or_two_ends(given: int | str, first: int, last: int) -> None:
    assert StepRange.parsed(given, "here") == StepRange(first, last)
    assert first in StepRange(first, last) and last + 1 not in StepRange(first, last)


@pytest.mark.parametrize("given", [0, "0-3", "5-3", "x", "", "1,2", -1])
def test_what_is_none_is_refused_with_its_key(given: int | str) -> None:
    with pytest.raises(ConfigError, match=r"monitor\.memory\.steps is .*such as 10-12"):
        MonitorConfig(memory=given)


def test_short_and_long_forms_mean_the_same() -> None:
    assert MonitorConfig(memory=3).memory_steps == MemoryConfig(steps=3)
    assert MonitorConfig(profile="10-12").profile_steps == ProfileConfig(steps="10-12")
    assert MonitorConfig(profile=ProfileConfig(steps=4)).profile_steps == ProfileConfig(steps=4)
    assert MonitorConfig().memory_steps is None and MonitorConfig().profile_steps is None


def test_ranks_are_counted_from_0() -> None:
    with pytest.raises(ConfigError, match="name ranks from 0 on"):
        ProfileConfig(ranks=(-1,))


@pytest.mark.parametrize(("memory", "profile"), [("3-9", "10-12"), (11, "10-12"), (1, 1)])
def test_one_step_is_not_looked_at_by_both(memory: int | str, profile: int | str) -> None:
    with pytest.raises(ConfigError, match="one profiler at a time"):
        MonitorConfig(memory=memory, profile=profile)
    MonitorConfig(memory=8, profile="10-12")
