"""Tell somebody when a run is not as it should be: a line of the recipe, or a function; to the log, a command, a URL."""

from trainfleet.monitor.alerts.alerts import Alerts
from trainfleet.monitor.alerts.settings import Alert

__all__ = ["Alert", "Alerts"]
