"""Mixtures of experts: a layer of our own, and experts dealt out over ranks, ours or those of other libraries."""

from trainfleet.parallel.experts.apply import split_experts
from trainfleet.parallel.experts.layer import Experts, MixtureOfExperts, balance_loss

__all__ = ["Experts", "MixtureOfExperts", "balance_loss", "split_experts"]
