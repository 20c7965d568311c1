"""Fields: the arrays of a batch, or of what a module gives, each with where it stands in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from trainfleet.training.inspection.values import is_number


def fields_of(value: Any) -> Iterator[tuple[str, Any]]:
    """(`['input']`, tensor) of every tensor of floating-point numbers, in a fixed order; one alone has no place."""
    for place, array in places_of(value):
        if is_number(array):
            yield place, array


def places_of(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """(place, array) of every array, in the order of `trainfleet.batch.arrays`."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        yield place, value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from places_of(each, f"{place}[{key!r}]")
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        for name in value._fields:
            yield from places_of(getattr(value, name), f"{place}.{name}")
    elif isinstance(value, list | tuple):
        for i, each in enumerate(value):
            yield from places_of(each, f"{place}[{i}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            if hasattr(value, field.name):
                yield from places_of(getattr(value, field.name), f"{place}.{field.name}")
