"""Losses by short name, each a LossSum: a total over what it weighs, so that unequal batches count rightly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from trainfleet.batch import Batch, weighted_rows
from trainfleet.errors import ConfigError, DataError
from trainfleet.imports import load_object
from trainfleet.loss import LossSum

if TYPE_CHECKING:
    from torch import Tensor


def loss_by_name(name: str) -> Callable[[Any, Batch], Any]:
    """`cross_entropy`, `mse`, `model`, or what an import path names."""
    if ":" in name:
        found = load_object(name, key="loss")
        if not callable(found):
            raise ConfigError(f"loss is {name!r}, which is a {type(found).__name__}; name a function (output, batch).")
        return found  # type: ignore[no-any-return]
    if name not in LOSSES:
        raise ConfigError(f"loss is {name!r}; use one of {', '.join(LOSSES)}, or an import path 'package.module:name'.")
    return LOSSES[name]


def cross_entropy(output: Any, batch: Batch) -> LossSum:
    """Of logits [..., classes] and labels [...]: summed over labels, weighed by their number.

    A label of -100 is left out; a batch's `weight` (one number a sample) multiplies.
    """
    from torch.nn import functional

    logits, labels = _prediction(output), target_of(batch)
    losses = functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none").view(labels.shape)
    return _weighed(losses, (labels != -100).to(losses.dtype), batch)


def mse(output: Any, batch: Batch) -> LossSum:
    """Squared error, averaged over the elements of a sample, summed over samples."""
    predicted, target = _prediction(output), target_of(batch)
    if predicted.shape != target.shape:
        raise DataError(
            f"The model returned shape {tuple(predicted.shape)} and the targets are {tuple(target.shape)}; "
            "they must be equal for the loss 'mse'."
        )
    losses = (predicted - target.to(predicted.dtype)).square().flatten(1).mean(1)
    return _weighed(losses, losses.new_ones(losses.shape), batch)


def model_loss(output: Any, batch: Batch) -> Any:
    """The loss that the model computed itself: its output, or the output's `loss`."""
    if isinstance(output, LossSum):
        return output
    if isinstance(output, Mapping) and "loss" in output:
        return output["loss"]
    return getattr(output, "loss", output)


LOSSES: dict[str, Callable[[Any, Batch], Any]] = {"cross_entropy": cross_entropy, "mse": mse, "model": model_loss}


def target_of(batch: Batch) -> Tensor:
    """The labels of a batch: the second of a pair, or its `target`, `targets`, `label` or `labels`."""
    if isinstance(batch, Mapping):
        for key in ("target", "targets", "label", "labels"):
            if key in batch:
                return batch[key]  # type: ignore[no-any-return]
        raise DataError(f"A batch with the keys {', '.join(map(str, batch))} has no target; name one 'target'.")
    if isinstance(batch, list | tuple) and len(batch) >= 2:
        return batch[1]  # type: ignore[no-any-return]
    raise DataError(f"A batch of type {type(batch).__name__} has no target; use pairs, or a dict with 'target'.")


def _prediction(output: Any) -> Tensor:
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"]  # type: ignore[no-any-return]
    return getattr(output, "logits", output)  # type: ignore[no-any-return]


def _weighed(losses: Tensor, weights: Tensor, batch: Batch) -> LossSum:
    _, per_sample = weighted_rows(batch)
    if per_sample is not None:
        per_sample = per_sample.to(weights.dtype)
        weights = weights * per_sample.view(-1, *[1] * (weights.ndim - 1))
    return LossSum((losses * weights).sum(), weights.sum())
