"""Tables and JSON on standard output, as all verbs print them."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, right: Collection[str] = ()) -> None:
    """Columns named in `right` to the right, words to the left; columns without a word are left out."""
    columns = [i for i in range(len(head)) if any(row[i] for row in rows)]
    if not columns:
        return
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, *rows):
        cells = [f"{row[i]:>{widths[i]}}" if head[i] in right else f"{row[i]:<{widths[i]}}" for i in columns]
        print("  ".join(cells).rstrip())


def print_json(value: Any) -> None:
    print(json.dumps(jsonable(value), indent=2))


def jsonable(value: Any) -> Any:
    """JSON has no nan, no infinity and no bytes: they become text."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
