"""What an alert tells: the same facts in the log, in variables for a command, and as JSON."""

from __future__ import annotations

import math
import socket
import time
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """About one alert that fired."""

    alert: str
    text: str
    """A sentence."""
    step: int
    value: float
    run: str
    """The run folder; empty where there is none."""
    host: str = field(default_factory=socket.gethostname)
    time: float = field(default_factory=time.time)

    def variables(self) -> dict[str, str]:
        """Of the command's environment."""
        return {
            "ALERT_WHEN": self.alert,
            "ALERT_TEXT": self.text,
            "ALERT_STEP": str(self.step),
            "ALERT_VALUE": f"{self.value:.17g}",
            "ALERT_RUN": self.run,
            "ALERT_HOST": self.host,
        }

    def json(self) -> dict[str, Any]:
        """`text` is what chat services show."""
        return {
            "text": f"{self.text} ({self.run or 'no folder'} on {self.host})",
            "alert": self.alert,
            "step": self.step,
            "value": self.value if math.isfinite(self.value) else str(self.value),
            "run": self.run,
            "host": self.host,
            "time": self.time,
        }
