"""Split the layers of a model over tensor-parallel ranks: found by structure, right by construction."""

from trainfleet.parallel.tensor.apply import Split, split_layers
from trainfleet.parallel.tensor.find import Region, find_regions

__all__ = ["Region", "Split", "find_regions", "split_layers"]
