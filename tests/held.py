"""A Stateful that hands out what it holds and keeps what it is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Held:
    def __init__(self, **value: Any) -> None:
        self.value: Any = value
        self.loads = 0

    def state_dict(self) -> Any:
        return self.value

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        self.value = dict(state)
        self.loads += 1
