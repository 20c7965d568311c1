"""See what limits a run and what to turn, in order of gain."""

from trainfleet.doctor.run.diagnosis import diagnose, examine_run
from trainfleet.doctor.run.summary import Summary, summarize

__all__ = ["Summary", "diagnose", "examine_run", "summarize"]
