"""A pipeline of stages: modules dealt out to ranks in turn, and micro-batches that pass through them."""

from trainfleet.parallel.pipeline.apply import deal_out, described, split_stages
from trainfleet.parallel.pipeline.pipe import Pipeline

__all__ = ["Pipeline", "deal_out", "described", "split_stages"]
