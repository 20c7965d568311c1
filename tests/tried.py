"""Tests of how long things take, on hosts that do other work too: what is planted is found in one of three tries."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

TRIES = 3


def found_in_one_of_three(test: Callable[..., Any]) -> Callable[..., Any]:
    """`test`, repeated where it fails: a busy host adds time, and never takes any away."""

    @functools.wraps(test)
    def tried(*args: Any, **kwargs: Any) -> Any:
        for _ in range(TRIES - 1):
            try:
                return test(*args, **kwargs)
            except AssertionError:
                continue
        return test(*args, **kwargs)

    return tried
