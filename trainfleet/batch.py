"""Batches: any nesting of dicts, lists, tuples and dataclasses around tensors, and streams of them."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any, Protocol, TypeAlias, runtime_checkable

from trainfleet.errors import DataError

Batch: TypeAlias = Any


@runtime_checkable
class BatchStream(Protocol):
    """An iterator of batches that can say where it is and resume there."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __next__(self) -> Batch: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any], /) -> None: ...


def map_arrays(function: Callable[[Any], Any], batch: Batch) -> Batch:
    """The same nesting with `function` applied to every array; other leaves stay as they are."""
    if hasattr(batch, "shape") and hasattr(batch, "dtype"):
        return function(batch)
    if isinstance(batch, Mapping):
        mapped = {key: map_arrays(function, value) for key, value in batch.items()}
        if type(batch) is dict:
            return mapped
        if not isinstance(batch, MutableMapping):
            return type(batch)(**mapped)
        clone = copy.copy(batch)  # its class may be made in a way of its own
        for key, value in mapped.items():
            clone[key] = value
        return clone
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_arrays(function, value) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(map_arrays(function, value) for value in batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        twin: Any = copy.copy(batch)  # it may have fields that its constructor does not take
        for field in dataclasses.fields(batch):
            if hasattr(batch, field.name):
                object.__setattr__(twin, field.name, map_arrays(function, getattr(batch, field.name)))
        return twin
    return batch


def arrays(batch: Batch) -> list[Any]:
    """Every array of a batch, in a fixed order."""
    found: list[Any] = []
    map_arrays(lambda array: found.append(array) or array, batch)  # type: ignore[func-returns-value]
    return found


def batch_size(batch: Batch) -> int:
    """Samples in a batch: the first dimension of its first array that has one."""
    for array in arrays(batch):
        if len(array.shape):
            return int(array.shape[0])
    raise DataError(f"A batch of type {type(batch).__name__} holds no array, so its size is unknown.")


def cut_batch(batch: Batch, parts: int) -> list[Batch]:
    """The batch in `parts` equal parts along the first dimension of its arrays; those without one go to every part.

    Raises DataError where an array's first dimension is not that of the batch, or `parts` does not divide it.
    """
    if parts == 1:
        return [batch]
    size = batch_size(batch)
    if size % parts:
        raise DataError(
            f"plan.microbatches is {parts}, which does not divide the {size} samples of a micro-batch. "
            f"Use a micro-batch that is a multiple of {parts}."
        )
    length = size // parts

    def part_of(array: Any, start: int) -> Any:
        if not len(array.shape):
            return array
        if array.shape[0] != size:
            raise DataError(
                f"A micro-batch of {size} samples holds an array of shape {tuple(array.shape)}, so it cannot be cut "
                f"into plan.microbatches = {parts} parts. Let the first dimension be the samples, or set it to 1."
            )
        return array[start : start + length]

    return [map_arrays(functools.partial(part_of, start=start), batch) for start in range(0, size, length)]


def to_device(batch: Batch, device: Any) -> Batch:
    """The batch on `device`; copies from pinned memory do not wait for the device."""
    return map_arrays(lambda array: array.to(device, non_blocking=True) if hasattr(array, "to") else array, batch)


def weighted_rows(batch: Batch) -> tuple[Batch, Any]:
    """(the batch without the weights of its samples, those weights [N] or None), which streams add to fill slots.

    A weight is the `weight` of a mapping or an object, or the third of three.
    """
    if isinstance(batch, Mapping) and "weight" in batch:
        return {key: value for key, value in batch.items() if key != "weight"}, batch["weight"]
    if type(batch) in (list, tuple) and len(batch) == 3:
        weight, rows = batch[2], batch_size(batch)
        if tuple(getattr(weight, "shape", ())) == (rows,) and "float" in str(weight.dtype):
            return type(batch)(batch[:2]), weight
    return batch, getattr(batch, "weight", None)


def call_with_batch(model: Callable[..., Any], batch: Batch) -> Any:
    """How a model is called unless the recipe says otherwise.

    (inputs, labels) pairs and dicts with `input` or `inputs` give the model that part; other dicts go in as
    keyword arguments, `weight` only where `forward` takes it; anything else as it is.
    """
    if isinstance(batch, Mapping):
        for key in ("input", "inputs"):
            if key in batch:
                return model(batch[key])
        if "weight" in batch and not _takes_weight(model):
            batch, _ = weighted_rows(batch)
        return model(**batch)
    if isinstance(batch, list | tuple) and len(batch) == 2 and not hasattr(batch, "_fields"):
        return model(batch[0])
    return model(batch)


def _takes_weight(model: Callable[..., Any]) -> bool:
    parameters = inspect.signature(getattr(model, "forward", model)).parameters
    return "weight" in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())
