"""Tell what is not as usual in a run, from plain numbers; what is done about it is the business of the loop."""

from trainfleet.monitor.anomalies.config import AnomalyConfig
from trainfleet.monitor.anomalies.disk import Disk
from trainfleet.monitor.anomalies.finding import Finding, Spell
from trainfleet.monitor.anomalies.growth import Growth
from trainfleet.monitor.anomalies.jumps import Jump, Jumps
from trainfleet.monitor.anomalies.pace import Pace
from trainfleet.monitor.anomalies.slow_rank import SlowRank
from trainfleet.monitor.anomalies.starvation import Starvation

__all__ = [
    "AnomalyConfig",
    "Disk",
    "Finding",
    "Growth",
    "Jump",
    "Jumps",
    "Pace",
    "SlowRank",
    "Spell",
    "Starvation",
]
