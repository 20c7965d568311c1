"""Cross-entropy with its derivative, whole and with the vocabulary split over ranks."""

from __future__ import annotations

import numpy as np

from trainfleet.comm.group import Group
from trainfleet.loss import LossSum
from trainfleet.mpi.arrays import Array, all_sum, namespace


def cross_entropy(logits: Array, targets: Array) -> tuple[LossSum, Array]:
    """Sum over rows of log(sum of exp) - logit of the target, and its derivative softmax - one.

    The weight is the number of rows: the last dimension is that of the classes.
    """
    return vocabulary_parallel_cross_entropy(logits, targets, None)


def vocabulary_parallel_cross_entropy(logits: Array, targets: Array, group: Group | None) -> tuple[LossSum, Array]:
    """The same where each rank holds the logits of its part of the classes, rank 0 those of the first ones.

    Shoeybi et al., arXiv:1909.08053, section 3: only one number a row travels (the largest logit, the sum of
    exponentials, the logit of the target), never the logits. Every rank gets the same loss and its own derivative.
    """
    xp = namespace(logits)
    rank, largest = (group.rank if group else 0), xp.max(logits, axis=-1, keepdims=True)
    if group is not None:
        largest = all_sum(largest, group, "max")
    exponentials = xp.exp(logits - largest)
    first = rank * logits.shape[-1]
    is_target = targets[..., None] == first + xp.arange(logits.shape[-1])
    total = xp.sum(exponentials, axis=-1, keepdims=True)
    own = xp.sum(xp.where(is_target, logits - largest, xp.zeros_like(logits)), axis=-1, keepdims=True)
    if group is not None:
        total, own = all_sum(total, group), all_sum(own, group)
    loss = xp.sum(xp.log(total) - own)
    return LossSum(float(loss), int(np.prod(targets.shape))), exponentials / total - is_target
