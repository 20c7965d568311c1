"""Split the layers of a model over tensor-parallel ranks: found by structure, right by construction."""

from trainfleet.parallel.tensor.apply import Split, split_layers, split_model, split_regions
from trainfleet.parallel.tensor.find import find_regions
from trainfleet.parallel.tensor.layer import Region

__all__ = ["Region", "Split", "find_regions", "split_layers", "split_model", "split_regions"]
