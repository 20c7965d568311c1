"""A run read back from its folder, whole or under way, however often it was started anew."""

from trainfleet.monitor.history.brief import read_brief
from trainfleet.monitor.history.figures import Comparison, compare, differing, figures
from trainfleet.monitor.history.goodput import Goodput
from trainfleet.monitor.history.run import History, is_run, read_run
from trainfleet.monitor.history.standing import Standing, standing
from trainfleet.monitor.history.steps import Group

__all__ = [
    "Comparison",
    "Goodput",
    "Group",
    "History",
    "Standing",
    "compare",
    "differing",
    "figures",
    "is_run",
    "read_brief",
    "read_run",
    "standing",
]
