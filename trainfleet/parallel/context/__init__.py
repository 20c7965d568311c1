"""Split each sequence over context-parallel ranks: ring attention or all-to-all, right by construction."""

from trainfleet.parallel.context.apply import split_context
from trainfleet.parallel.context.region import Context

__all__ = ["Context", "split_context"]
