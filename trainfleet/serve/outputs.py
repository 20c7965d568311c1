"""What a model's output and a batch mean: the scores of classes or the values, the labels, and which rows count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from trainfleet.batch import Batch, map_arrays
from trainfleet.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor

LABELS = ("target", "targets", "label", "labels")
LEFT_OUT = -100
"""The label of what must not count, as in torch's cross_entropy."""


class Reading(NamedTuple):
    """A model's output, understood."""

    kind: Literal["classes", "values"]
    scores: Tensor
    """classes: logits [..., C], float32; C = 2 and the first column 0 where the model gives one logit.
    values: [N, ...], float32."""


def labels_of(batch: Batch) -> Any:
    """The labels: the second of a pair, or `target`, `targets`, `label` or `labels`; None where there are none."""
    if isinstance(batch, Mapping):
        return next((batch[key] for key in LABELS if key in batch), None)
    if isinstance(batch, list | tuple) and len(batch) >= 2:
        return batch[1]
    return None


def is_shifted(model: Any, inputs: Batch) -> bool:
    """Whether the model shifts its labels itself, as causal language models of transformers do with `labels`."""
    of_transformers = any(cls.__name__ == "PreTrainedModel" for cls in type(model).__mro__)
    is_causal = type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
    return of_transformers and is_causal and isinstance(inputs, Mapping) and "labels" in inputs


def prediction(output: Any) -> Tensor:
    """The tensor of an output: itself, the `logits` of a mapping or an object, or the first of several."""
    import torch

    found = output["logits"] if isinstance(output, Mapping) and "logits" in output else output
    found = getattr(found, "logits", found)
    if isinstance(found, list | tuple) and found:
        found = found[0]
    if not isinstance(found, torch.Tensor):
        raise DataError(
            f"The model returned a {type(output).__name__}; it must return a tensor, something with `logits`, or a "
            "tuple that begins with a tensor.",
            hint="Give forward=, a function (model, batch) that returns the logits.",
        )
    return found


def in_float32(output: Any) -> Any:
    """The output with float32 in place of narrower floats: losses and softmax are taken from it."""
    import torch

    narrow = (torch.float16, torch.bfloat16)
    return map_arrays(lambda array: array.float() if getattr(array, "dtype", None) in narrow else array, output)


def read_output(output: Any, labels: Any, rows: int, classes: int | None) -> Reading:
    """What the output stands for. `classes`: how many the model tells apart, 0 for values, None to find out.

    Found out by the labels: floats mean values, integers classes, one logit for each two classes. Without labels a
    last dimension longer than 1 means classes. DataError where the shapes do not go together.
    """
    found = prediction(output)
    if found.ndim == 0 or found.shape[0] != rows:
        raise DataError(
            f"The model returned shape {tuple(found.shape)} for a batch of {rows} rows; one each is needed."
        )
    if classes == 0 or (classes is None and labels is not None and labels.is_floating_point()):
        return Reading("values", found.float())
    if not found.is_floating_point():
        raise DataError(f"The model returned {found.dtype}; scores of classes are floats.")
    is_alike = labels is not None and labels.shape == found.shape
    by_shape = found.ndim > 1 and found.shape[-1] > 1 and not is_alike
    if classes is None and labels is None and not by_shape:
        raise ConfigError(
            "The model gives one number a row, which may be the logit of two classes or a value.",
            hint="Say which: classes=2 or classes=0.",
        )
    if by_shape and classes in (None, found.shape[-1]):
        scores = found.float()
    elif not by_shape and classes in (None, 2):
        scores = _two_classes(found.float() if found.ndim == 1 or is_alike else found.float().squeeze(-1))
    else:
        raise DataError(f"The model returned shape {tuple(found.shape)}, and classes={classes} is asked of it.")
    return Reading("classes", scores)


def _two_classes(logit: Tensor) -> Tensor:
    """[...] -> [..., 2]: softmax over (0, z) is (1 - sigmoid(z), sigmoid(z))."""
    import torch

    return torch.stack([torch.zeros_like(logit), logit], -1)


def labels_for(scores: Tensor, labels: Tensor) -> Tensor:
    """The labels in the shape of the scores without their classes: [N, 1] beside [N, C] is [N]. DataError if none."""
    if labels.is_floating_point() or labels.numel() * scores.shape[-1] != scores.numel() or len(labels) != len(scores):
        raise DataError(
            f"The labels are {str(labels.dtype).removeprefix('torch.')} of shape {tuple(labels.shape)}, and the scores "
            f"have shape {tuple(scores.shape)}: classes stand on the last dimension, with one integer label for each.",
            hint="Give forward=, a function (model, batch) that returns [rows, classes].",
        )
    return labels.reshape(scores.shape[:-1])
