"""What a GPU service says of itself first, checked on arrival."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from trainfleet.errors import PeerError

_MOST = 1 << 48


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A model that answers. Those of equal `digest` give equal answers."""

    digest: str
    """Of the weights."""
    model: str
    """Its name, for sentences."""
    device: str
    """Where it computes, for sentences."""
    classes: int
    """How many it tells apart; 0 where that is not known before an answer."""
    room: int
    """Bytes of batches that one client may have there without an answer. A single batch may be larger."""

    def __post_init__(self) -> None:
        if not 0 < len(self.digest) <= 200 or not 0 <= self.classes <= _MOST or not 0 < self.room <= _MOST:
            raise PeerError(f"A GPU service offers what cannot be: {str(asdict(self))[:200]}.")

    def to_plain(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_plain(cls, told: Any) -> Offer:
        """PeerError for anything that `to_plain` does not give."""
        kinds = {field.name: int if str(field.type) == "int" else str for field in fields(cls)}
        if not isinstance(told, dict) or set(told) != set(kinds):
            raise PeerError(f"A GPU service's first words hold {str(told)[:80]} where {', '.join(kinds)} belong.")
        for key, kind in kinds.items():
            if type(told[key]) is not kind:
                raise PeerError(f"A GPU service tells {str(told[key])[:80]!r} as {key}, which is no {kind.__name__}.")
        return cls(**told)
