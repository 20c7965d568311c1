"""A step of a run again, under inspection."""

from trainfleet.training.replay.of_run import places_of_modules, replay
from trainfleet.training.replay.replayed import Replayed

__all__ = ["Replayed", "places_of_modules", "replay"]
