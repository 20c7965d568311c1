from __future__ import annotations

import pytest

from trainfleet.checkpoint import CheckpointConfig, Retention
from trainfleet.errors import ConfigError


@pytest.mark.parametrize("arguments", [{"every": 0}, {"keep_last": 0}, {"keep_every": 0}, {"timeout_seconds": 0.0}])
def test_a_config_that_cannot_work_is_refused_by_key(arguments):
    with pytest.raises(ConfigError, match=f"checkpoint.{next(iter(arguments))}"):
        CheckpointConfig(**arguments)


def test_a_config_has_its_retention():
    assert CheckpointConfig(keep_last=5, keep_every=10).retention == Retention(last=5, every=10)
    assert CheckpointConfig(every=None).every is None
