"""Operators of your own: each with a twin in plain torch that says what it computes, and a check against it."""

from trainfleet.kernels.check import Agreement, check_kernel
from trainfleet.kernels.linear_cross_entropy import linear_cross_entropy
from trainfleet.kernels.register import Kernel, register_kernel

__all__ = ["Agreement", "Kernel", "check_kernel", "linear_cross_entropy", "register_kernel"]
