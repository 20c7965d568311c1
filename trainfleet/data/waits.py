"""What a loop waits for while it has no batch: the source, the transform, or the network."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from trainfleet.data.samples import Made

CAUSES = ("source", "transform", "network", "data")
"""`data`: batches whose making nobody has timed."""
_NO_QUEUE = 0.2
"""Of the time that making and sending a batch took: queues shorter than that say nothing about what is the limit."""


class Way(NamedTuple):
    """How long a batch of a feeder was on its way, beside being made. Seconds."""

    queued: float
    """Until a worker of the feeder had time for it."""
    outbox: float
    """Until the batches before it were sent."""
    transit: float
    """The question there and the batch back."""


class Waits:
    """Of one stream, since it began."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(CAUSES, 0.0)
        """By cause; together all that the loop waited."""
        self.num_bytes = 0
        """Received from feeders."""

    def add(self, seconds: float, made: Made) -> None:
        """The loop has waited so long for this batch."""
        self.num_bytes += made.num_bytes
        for cause, share in causes_of(seconds, made).items():
            self.seconds[cause] += share


def causes_of(seconds: float, made: Made) -> dict[str, float]:
    """The seconds that a loop waited for a batch, by cause.

    Batches are made and sent side by side, so the slower of the two is the limit, and a queue stands before it: of
    batches that wait for a worker, or of batches that wait to be sent. Where none does, batches are asked for one after
    the other, and the last thing that happened to this one was its way here.
    """
    network = _on_the_way(seconds, made)
    making = seconds - network
    source, transform = made.spent
    if source + transform <= 0.0:
        return {"data": making, "network": network}
    in_source = making * source / (source + transform)
    return {"source": in_source, "transform": making - in_source, "network": network}


def _on_the_way(seconds: float, made: Made) -> float:
    way = made.way
    if way is None:
        return 0.0
    queues = way.queued + way.outbox
    if queues > _NO_QUEUE * (sum(made.spent) + way.transit):
        return seconds * way.outbox / queues
    return min(seconds, way.transit)
