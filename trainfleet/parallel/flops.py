"""Model FLOPs: the multiplications and additions of a forward and a backward, counted once on tensors without numbers.

Counted are the operators that `torch.utils.flop_counter` has formulas for (matrix products, convolutions, attention),
two for each multiplication with its addition. Attention counts whole under a causal mask, as the formula
6 N + 12 L H Q T a token does (Chowdhery et al., PaLM, arXiv:2204.02311, appendix B). Not counted: what is computed
again in backward to save memory, element by element arithmetic, the optimizer, and operators without a formula
(`torch.utils.flop_counter.register_flop_formula` gives them one).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from trainfleet.batch import Batch, arrays, call_with_batch
from trainfleet.errors import PlanError
from trainfleet.loss import LossSum
from trainfleet.parallel.pipeline.shadow import Shadow
from trainfleet.parallel.torch_private import DATA_DEPENDENT, UNSEEN_OPERATORS


class ModelFlops:
    """Counts for the whole model, before `parallelize` spreads it; a copy without memory is kept until it is asked.

    `loss_fn(output, batch)` and `prepare(batch)` are those of the engine. PlanError for a model that cannot be copied.
    """

    def __init__(
        self, model: nn.Module, loss_fn: Callable[[Any, Batch], Any], prepare: Callable[..., Batch] | None = None
    ) -> None:
        self._shadow: Shadow | None = Shadow(model, "cpu")
        self._loss_fn, self._prepare = loss_fn, prepare
        self._per_element = 0.0

    def of(self, batch: Batch) -> float:
        """FLOPs of the forward and backward of a micro-batch: counted for the first, of later ones in proportion.

        The measure is the number of elements of a batch's arrays, so it is exact where batches have equal shapes.
        PlanError where that of the first cannot be counted on tensors without numbers.
        """
        shadow, self._shadow = self._shadow, None
        if shadow is not None:
            self._per_element = self._count(shadow, batch) / _elements(batch)
        return self._per_element * _elements(batch)

    def _count(self, shadow: Shadow, batch: Batch) -> float:
        try:
            return self._counted(shadow, shadow.of(batch))
        except (*DATA_DEPENDENT, *UNSEEN_OPERATORS) as exc:
            raise PlanError(
                f"The FLOPs of {type(shadow.model).__name__} cannot be counted on tensors without numbers, for its "
                f"forward asks for them or has an operator without a shape function: {exc}. "
                "Give monitor.flops_per_token."
            ) from exc

    def _counted(self, shadow: Shadow, twins: Batch) -> float:
        # Of attention, this backend alone consists of operators that are counted one by one, without what flash
        # attention computes again.
        with shadow.fake, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.enable_grad():
            if self._prepare is not None:
                with torch.no_grad():
                    twins = self._prepare(twins)
            loss = LossSum.of(self._loss_fn(call_with_batch(shadow.model.train(), twins), twins))
            loss.total.backward()
        return float(counter.get_total_flops())


def _elements(batch: Batch) -> int:
    return sum(math.prod(array.shape) for array in arrays(batch)) or 1
