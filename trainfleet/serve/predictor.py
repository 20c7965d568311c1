"""Predictor: a model on this host that answers for batches, with arrays as small as what was asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from trainfleet.batch import Batch, batch_size, call_with_batch, map_arrays, to_device, weighted_rows
from trainfleet.errors import ConfigError, DataError
from trainfleet.loss import LossSum
from trainfleet.serve.outputs import (
    LEFT_OUT,
    Reading,
    in_float32,
    is_shifted,
    labels_for,
    labels_of,
    read_output,
)
from trainfleet.serve.terms import Answer, Terms

if TYPE_CHECKING:
    from torch import Tensor, nn

TOP = 5
"""validate counts labels among so many of the highest scores, where there are more classes than that."""


class Predictor:
    """An `Answering` over `model`, which is put into its evaluation mode, and onto `device` where one is given.

    loss_fn   (output, batch) -> LossSum or a scalar tensor; None: validation has no loss
    forward   (model, batch) -> output; None: as `trainfleet.batch.call_with_batch`
    prepare   (batch) -> batch, called first, on the device
    classes   how many the model tells apart; 0: it gives values; None: found by labels and output. 2 with one
              logit a row: sigmoid

    Scores are taken in float32 whatever the model computes in. Nothing random, nothing remembered: an answer depends
    on weights, batch and terms. Rows of weight 0 and labels of -100 count nowhere. Causal language models of
    transformers are counted as they count their loss: the scores of a position are for the label of the next.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss_fn: Callable[[Any, Batch], Any] | None = None,
        forward: Callable[[nn.Module, Batch], Any] | None = None,
        prepare: Callable[[Batch], Batch] | None = None,
        device: str | None = None,
        classes: int | None = None,
    ) -> None:
        if classes is not None and (classes < 0 or classes == 1):
            raise ConfigError(f"classes is {classes}; use 2 or more, or 0 for a model that gives values.")
        self.model = (model if device is None else model.to(device)).eval()
        self.classes = classes
        self._loss_fn, self._forward, self._prepare = loss_fn, forward or call_with_batch, prepare
        self._device = device

    @cached_property
    def digest(self) -> str:
        """XXH3-128 of names, dtypes, shapes and bytes of all that the state dict holds, in the order of names."""
        return digest_of(self.model)

    @property
    def device(self) -> Any:
        """Where batches are moved to: that of the first parameter, unless another was given."""
        if self._device is not None:
            return self._device
        return next((tensor.device for tensor in self.model.parameters()), "cpu")

    def answers(self, batches: Iterable[Batch], terms: Terms) -> Iterator[Answer]:
        """One for each batch, when it is asked for: nothing is read ahead."""
        return (self.answer(batch, terms) for batch in batches)

    def answer(self, batch: Batch, terms: Terms) -> Answer:
        """What `terms` want of a batch, as `answer.py` has it.

        DataError where output, labels and batch do not go together; ConfigError where the terms ask for what this
        model cannot give.
        """
        import torch

        with torch.no_grad():
            batch = to_device(map_arrays(_tensor, batch), self.device)
            if self._prepare is not None:
                batch = self._prepare(batch)
            inputs, weight = weighted_rows(batch)
            rows = batch_size(inputs)
            output = in_float32(self._forward(self.model, inputs))
            labels = labels_of(batch)
            if self.classes == 2 and labels is not None and labels.is_floating_point():
                labels = labels.long()  # a loss over single logits wants floats
            if is_shifted(self.model, inputs):
                labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=LEFT_OUT)
            reading = read_output(output, labels, rows, self.classes)
            counts = torch.ones(rows, dtype=torch.bool, device=reading.scores.device) if weight is None else weight > 0
            if terms.task == "predict":
                found = _values(reading, counts, terms) if reading.kind == "values" else _ranked(reading, counts, terms)
            else:
                if labels is None:
                    raise DataError(
                        "The batches have no labels, so there is nothing to validate against.",
                        hint="Name them 'target', give pairs, or use predict.",
                    )
                found = (
                    _errors(reading, labels, counts) if reading.kind == "values" else _counts(reading, labels, counts)
                )
                if self._loss_fn is not None:
                    found["loss"] = _loss(self._loss_fn(output, batch))
            return {"rows": np.array(rows), **{name: _array(value) for name, value in found.items()}}


def digest_of(model: nn.Module) -> str:
    """As `Predictor.digest`. Tensors are brought to the host one at a time."""
    import torch
    import xxhash

    digest = xxhash.xxh3_128()
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, torch.Tensor):
            whole = value.detach().cpu().contiguous()
            digest.update(f"{name} {whole.dtype} {tuple(whole.shape)}\n".encode())
            digest.update(whole.reshape(-1).view(torch.uint8).numpy().data if whole.numel() else b"")
        else:
            digest.update(f"{name} {value!r}\n".encode())
    return digest.hexdigest()


def _counts(reading: Reading, labels: Tensor, counts: Tensor) -> dict[str, Any]:
    """How often each (label, predicted class) came: `pairs` = label * C + predicted, sorted, and `counts` of each."""
    import torch

    num_classes = reading.scores.shape[-1]
    labels = labels_for(reading.scores, labels)
    wanted = (labels != LEFT_OUT) & counts.view(-1, *[1] * (labels.ndim - 1))
    scores, truth = reading.scores[wanted], labels[wanted].long()
    if truth.numel() and (int(truth.min()) < 0 or int(truth.max()) >= num_classes):
        raise DataError(
            f"Labels go from {int(truth.min())} to {int(truth.max())}, and the model has {num_classes} classes: "
            f"0 to {num_classes - 1}, or {LEFT_OUT} for what must not count."
        )
    pairs, times = torch.unique(truth * num_classes + scores.argmax(-1), return_counts=True)
    found: dict[str, Any] = {"num_classes": num_classes, "pairs": pairs, "counts": times}
    if num_classes > TOP:
        found["top"] = (scores.topk(TOP).indices == truth[:, None]).sum()
    return found


def _errors(reading: Reading, labels: Tensor, counts: Tensor) -> dict[str, Any]:
    """`errors` float64 [4, D]: sums of |error| and of its square, mean of the targets, their squares about it."""
    import torch

    values = reading.scores
    if values.shape != labels.shape and values.numel() == labels.numel() and values.shape[0] == labels.shape[0]:
        values = values.view(labels.shape)  # [N, 1] beside [N]
    if values.shape != labels.shape:
        raise DataError(
            f"The model returned shape {tuple(values.shape)} and the targets are {tuple(labels.shape)}; they must be "
            "equal where values are validated.",
            hint="Where these are scores of classes, give labels as integers, or classes=.",
        )
    truth, told = (
        labels[counts].flatten(1 if labels.ndim > 1 else 0),
        values[counts].flatten(1 if labels.ndim > 1 else 0),
    )
    truth, told = truth.reshape(len(truth), -1).double().cpu(), told.reshape(len(told), -1).double().cpu()
    error, mean = told - truth, truth.mean(0) if len(truth) else truth.new_zeros(truth.shape[1:])
    errors = torch.stack([error.abs().sum(0), error.square().sum(0), mean, (truth - mean).square().sum(0)])
    return {"count": len(truth), "errors": errors}


def _ranked(reading: Reading, counts: Tensor, terms: Terms) -> dict[str, Any]:
    """Rows that count and are sure enough: `kept`, `classes` and `confidences` [r, k], the most probable first."""
    import torch

    scores = reading.scores
    if scores.ndim > 2 and scores.shape[0] * scores.shape[-1] == scores.numel():
        scores = scores.view(scores.shape[0], -1)
    if scores.ndim != 2:
        raise ConfigError(
            f"The model returned scores of shape {tuple(scores.shape)}, and predict wants one row of classes for each "
            "sample.",
            hint="Give forward=, a function (model, batch) that returns [rows, classes].",
        )
    num_classes = scores.shape[1]
    if terms.top_k > num_classes:
        raise ConfigError(
            f"top_k is {terms.top_k}, and the model has {num_classes} classes; ask for that many at most."
        )
    probabilities = torch.softmax(scores, -1)
    best, classes = probabilities.topk(terms.top_k)
    if terms.confidence > 0:
        counts = counts & (best[:, 0] >= terms.confidence)
    kept = counts.nonzero().flatten()
    found = {
        "num_classes": num_classes,
        "kept": kept.to(torch.int32),
        "classes": classes[kept].to(torch.int32),
        "confidences": best[kept],
    }
    return found | ({"probabilities": probabilities[kept]} if terms.probabilities else {})


def _values(reading: Reading, counts: Tensor, terms: Terms) -> dict[str, Any]:
    """`kept`, and `values` float32 [r, ...]."""
    import torch

    asked = {"top_k": terms.top_k != 1, "confidence": terms.confidence > 0, "probabilities": terms.probabilities}
    if any(asked.values()):
        name = next(name for name in asked if asked[name])
        raise ConfigError(f"{name} is for models of classes, and this one gives values. Leave it out.")
    values = reading.scores.squeeze(-1) if reading.scores.ndim == 2 and reading.scores.shape[1] == 1 else reading.scores
    kept = counts.nonzero().flatten()
    return {"kept": kept.to(torch.int32), "values": values[kept]}


def _loss(value: Any) -> Any:
    """[total, weight], float64."""
    loss = LossSum.of(value)
    return np.array([float(loss.total), float(loss.weight)])


def _array(value: Any) -> Any:
    return value.cpu().numpy() if hasattr(value, "cpu") else np.asarray(value)


def _tensor(array: Any) -> Any:
    """A tensor over the memory of a NumPy array; what is no number stays."""
    import torch

    if not isinstance(array, np.ndarray | np.generic) or np.asarray(array).dtype.kind in "USOV":
        return array
    whole = np.asarray(array)
    if not whole.flags.writeable or not whole.dtype.isnative:
        whole = whole.astype(whole.dtype.newbyteorder("="))
    return torch.from_numpy(whole)
