"""What a trainer asks for and what a feeder has, in words that are checked on arrival."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, get_args

from trainfleet.data.sampler import Short, Span
from trainfleet.data.samples import Bad
from trainfleet.errors import PeerError

MOST = 1 << 48


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """How the order of a stream is cut, which of it is this rank's, and what is drawn at random."""

    stream: str
    """`training` or `evaluation`."""
    size: int
    rank: int
    world_size: int
    seed: int
    shuffle: bool
    short: Short
    bad: Bad

    def __post_init__(self) -> None:
        whole = 0 < self.size <= MOST and 0 <= self.rank < self.world_size <= MOST and abs(self.seed) < 1 << 64
        if not whole or self.short not in get_args(Short) or self.bad not in get_args(Bad):
            raise PeerError(f"A trainer asks for what cannot be: {asdict(self)}.")


@dataclass(frozen=True, slots=True)
class Unit(Span):
    """A span under its terms: all that a rank's micro-batch is a function of."""

    terms: Terms

    def __post_init__(self) -> None:
        if not 0 <= self.begin < self.end <= MOST or not 0 <= self.epoch <= MOST:
            raise PeerError(f"A trainer asks for positions {self.begin} to {self.end} of epoch {self.epoch}.")

    def to_plain(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "begin": self.begin, "end": self.end, "terms": asdict(self.terms)}

    @classmethod
    def from_plain(cls, told: Any) -> Unit:
        whole = _checked(told, {"epoch": int, "begin": int, "end": int, "terms": dict})
        terms = Terms(**_checked(whole["terms"], _kinds(Terms)))
        return cls(whole["epoch"], whole["begin"], whole["end"], terms)


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """One stream of a feeder, with what a trainer gets that asks for nothing else."""

    samples: int
    size: int
    seed: int
    shuffle: bool
    short: Short
    bad: Bad
    source: str
    """Its name, for sentences."""
    digest: str
    """Of what the samples are: alike on feeders whose batches are alike."""
    plain: bool
    """Whether its order is that of whole sources without shards, which a trainer can compute by itself."""

    def __post_init__(self) -> None:
        whole = 0 < self.samples <= MOST and 0 < self.size <= MOST and abs(self.seed) < 1 << 64
        if not whole or self.short not in get_args(Short) or self.bad not in get_args(Bad):
            raise PeerError(f"A feeder offers what cannot be: {asdict(self)}.")

    def to_plain(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_plain(cls, told: Any) -> Offer:
        return cls(**_checked(told, _kinds(cls)))


def _kinds(cls: Any) -> dict[str, type]:
    """The fields of a dataclass of integers, booleans and strings, by the type that each has in JSON."""
    return {field.name: {"int": int, "bool": bool}.get(str(field.type), str) for field in fields(cls)}


def _checked(told: Any, kinds: Mapping[str, type]) -> dict[str, Any]:
    """`told` if it has exactly these keys with values of these types; PeerError otherwise."""
    if not isinstance(told, dict) or set(told) != set(kinds):
        raise PeerError(f"A message holds {str(told)[:80]} where {', '.join(kinds)} belong.")
    for key, kind in kinds.items():
        if type(told[key]) is not kind:
            raise PeerError(f"A message holds {str(told[key])[:80]!r} as {key}, which is no {kind.__name__}.")
    return told
