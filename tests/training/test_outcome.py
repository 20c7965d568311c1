"""How a run ended is a value."""

from __future__ import annotations

import dataclasses

import pytest

from trainfleet.training.outcome import Outcome


def test_an_outcome_cannot_be_changed() -> None:
    outcome = Outcome(step=3, reason="finished", loss=0.5, evaluation=None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        outcome.step = 4  # type: ignore[misc]
