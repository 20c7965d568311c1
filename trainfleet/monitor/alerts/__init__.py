"""Tell somebody when a run is not as it should be: a line or a function says when; log, command, webhook hear."""

from trainfleet.monitor.alerts.alerts import Alerts
from trainfleet.monitor.alerts.settings import Alert

__all__ = ["Alert", "Alerts"]
