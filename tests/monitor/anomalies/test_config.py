"""What is watched for is checked when it is asked for."""

from __future__ import annotations

from typing import Any

import pytest

from trainfleet.config import load_config
from trainfleet.errors import ConfigError
from trainfleet.events import ANOMALIES
from trainfleet.monitor.anomalies import AnomalyConfig
from trainfleet.training.recipe import Recipe


def test_each_kind_has_a_policy_that_by_default_changes_nothing() -> None:
    config = AnomalyConfig().resolved(rolls_back=False)
    assert {kind: getattr(config, kind) for kind in ANOMALIES} == dict.fromkeys(ANOMALIES, "warn")
    assert not config.forgoes_updates


def test_where_copies_are_kept_what_is_not_finite_goes_back_to_them() -> None:
    config = AnomalyConfig(loss_not_finite="warn").resolved(rolls_back=True)
    assert (config.loss_not_finite, config.gradient_not_finite, config.loss_spike) == ("warn", "rollback", "warn")


def test_a_rollback_without_copies_is_refused_with_the_recipe() -> None:
    values: dict[str, Any] = {"monitor": {"anomalies": {"loss_spike": "rollback"}}}
    with pytest.raises(ConfigError, match=r"loss_spike is rollback, but train\.rollback_every is null"):
        load_config(Recipe, values=values, env={})
    recipe = load_config(Recipe, values={**values, "train": {"rollback_every": 5}}, env={}).value
    assert recipe.monitor.anomalies.loss_spike == "rollback"


@pytest.mark.parametrize("policy", ["skip", "rollback", "ignore"])
def test_a_policy_that_makes_no_sense_is_refused_with_those_that_do(policy: str) -> None:
    with pytest.raises(ConfigError, match="one of warn, stop or null"):
        load_config(Recipe, values={"monitor": {"anomalies": {"disk_filling": policy}}}, env={})


def test_null_switches_a_kind_off() -> None:
    values = {"monitor": {"anomalies": dict.fromkeys(ANOMALIES)}}
    config = load_config(Recipe, values=values, env={}).value.monitor.anomalies
    assert {getattr(config, kind) for kind in ANOMALIES} == {None}


@pytest.mark.parametrize(
    "wrong",
    [
        {"spike_deviations": 0.0},
        {"drop_factor": 1.0},
        {"dead_share": 1.5},
        {"dead_every": 0},
        {"lasting_seconds": -1.0},
    ],
)
def test_thresholds_that_mean_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"monitor\.anomalies\.{next(iter(wrong))} is"):
        AnomalyConfig(**wrong)


def test_a_policy_that_leaves_updates_out_is_known() -> None:
    assert AnomalyConfig(loss_spike="skip").forgoes_updates and AnomalyConfig(disk_filling="stop").forgoes_updates
    assert not AnomalyConfig(loss_not_finite="rollback").forgoes_updates
