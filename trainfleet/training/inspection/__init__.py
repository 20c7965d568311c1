"""Which module made a step not finite, and of which samples: the step run again with everything watched."""

from trainfleet.training.inspection.finding import Finding
from trainfleet.training.inspection.inspector import Inspector

__all__ = ["Finding", "Inspector"]
