"""One value against one type, by pydantic: strict, but forgiving where a text format left no choice."""

from __future__ import annotations

import json
import math
from datetime import timedelta
from functools import lru_cache
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from trainfleet.config.sections import type_in_words


class Refused(Exception):
    """The value is not of the type; the text says what is allowed."""


def checked(hint: Any, value: Any, text: str | None = None) -> Any:
    """`value` as `hint` wants it: a list becomes a tuple, 5 a float or five seconds, 1e4 a whole number.

    `text` is how the value was written where everything is a text: `run.name=007` means the text.
    Nothing else changes its kind: `true` is no number, "3" is no number, 1 is not true.
    """
    try:
        return _validated(hint, value)
    except ValidationError as error:
        mended = _mended(error, value, text)
        if mended is not value:
            try:
                return _validated(hint, mended)
            except ValidationError as second:
                error = second
        raise Refused(_allowed(hint, value, error)) from error


def _validated(hint: Any, value: Any) -> Any:
    if hint is Any:
        return value
    try:
        as_json = json.dumps(value)
    except (TypeError, ValueError):  # Python objects: classes, functions, paths, dataclasses
        return _adapter(hint).validate_python(value)
    # Strict JSON is the mode we mean: lists are tuples and mappings dataclasses, but no number is a boolean.
    result = _adapter(hint).validate_json(as_json, strict=True)
    if isinstance(value, bool) and not isinstance(result, bool):  # Literal[0, 1] takes True for 1
        raise Refused(f"allowed: {type_in_words(hint)}")
    return result


@lru_cache(maxsize=512)
def _adapter(hint: Any) -> TypeAdapter[Any]:
    try:
        return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticUserError:  # a dataclass brings its own configuration
        return TypeAdapter(hint)


def _mended(error: ValidationError, value: Any, text: str | None) -> Any:
    kinds = {problem["type"] for problem in error.errors(include_url=False, include_context=False)}
    if "string_type" in kinds and text is not None:
        return text
    if "int_type" in kinds and isinstance(value, float) and math.isfinite(value) and value == int(value):
        return int(value)
    if "time_delta_type" in kinds and isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return timedelta(seconds=value)
        except (OverflowError, ValueError):
            return value
    return value


def _allowed(hint: Any, value: Any, error: ValidationError) -> str:
    """What is allowed, and for a value of several parts which part is wrong and how."""
    words = f"allowed: {type_in_words(hint)}"
    problems = error.errors(include_url=False)
    if isinstance(value, bool | int | float) and any(p["type"] == "string_type" for p in problems):
        return f"{words}; put it in quotes"
    inner = [p for p in problems if p["loc"] and isinstance(p["loc"][-1], int)] or [
        p for p in problems if p["type"] not in _PLAIN
    ]
    if not inner:
        return words
    first = inner[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{words} ({f'{where}: ' if where else ''}{first['msg']})"


_PLAIN = {
    "int_type",
    "float_type",
    "bool_type",
    "string_type",
    "literal_error",
    "tuple_type",
    "list_type",
    "dict_type",
    "path_type",
    "time_delta_type",
    "none_required",
    "callable_type",
    "is_instance_of",
    "dataclass_type",
    "int_parsing",
    "float_parsing",
    "int_from_float",
}
