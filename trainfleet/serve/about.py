"""What a folder of predictions is of: whoever goes on with it must have the same weights, terms and data."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from trainfleet.errors import ConfigError, DataError, PeerError
from trainfleet.serve.terms import Terms

ABOUT = "_predictions.json"
"""Readers of Parquet folders pass over names that begin so."""
_FORMAT = "trainfleet predictions 1"


@dataclass(frozen=True, kw_only=True)
class About:
    """One run of predictions, however often it was broken off."""

    weights: str
    """Their digest."""
    terms: Terms
    first: str
    """Digest of the first row of the data; empty where it is only iterated."""
    samples: int | None = None
    """Rows of the data, where that is known."""
    names: tuple[str, ...] | None = None
    """Of the classes."""
    kept: int | None = None
    """Rows written, once it is done."""
    rows: int | None = None
    """Rows answered for, once it is done."""

    @property
    def is_done(self) -> bool:
        return self.rows is not None

    @property
    def digest(self) -> str:
        """Of what the rows depend on, not of how far it has come."""
        fixed = [self.weights, self.terms.to_plain(), self.first, self.samples]
        return xxhash.xxh3_128_hexdigest(json.dumps(fixed, sort_keys=True).encode())

    def to_json(self) -> str:
        told = asdict(self) | {"terms": self.terms.to_plain(), "format": _FORMAT, "done": self.is_done}
        return json.dumps(told, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: Path) -> About:
        """DataError for what `to_json` does not give."""
        try:
            return cls.from_plain(json.loads(text))
        except (ValueError, TypeError, PeerError, RecursionError) as error:
            raise DataError(
                f"{where} does not say which predictions these are: {str(error)[:200]}",
                hint="Name another folder, or begin this one anew with --fresh (fresh=True).",
            ) from error

    @classmethod
    def from_plain(cls, told: Any) -> About:
        """ValueError or PeerError for what is no such thing."""
        keys = {*cls.__dataclass_fields__, "format", "done"}
        if not isinstance(told, dict) or set(told) != keys or told["format"] != _FORMAT:
            raise ValueError(f"it holds {str(told)[:80]}")
        values = {key: told[key] for key in cls.__dataclass_fields__} | {"terms": Terms.from_plain(told["terms"])}
        counts = [values[name] for name in ("samples", "kept", "rows")]
        names = values["names"]
        is_named = names is None or (isinstance(names, list) and all(isinstance(name, str) for name in names))
        is_counted = all(count is None or (type(count) is int and count >= 0) for count in counts)
        texts = isinstance(values["weights"], str) and isinstance(values["first"], str)
        if not (texts and is_named and is_counted) or (values["kept"] is None) != (values["rows"] is None):
            raise ValueError(f"it holds {str(told)[:200]}")
        values["names"] = None if names is None else tuple(names)
        return cls(**values)

    def refuse_other(self, wanted: About, folder: Path) -> None:
        """ConfigError where this is not what `wanted` would go on with."""
        ours, theirs = self.terms.to_plain(), wanted.terms.to_plain()
        unlike = [f"{key} {ours[key]} and not {theirs[key]}" for key in ours if ours[key] != theirs[key]]
        if self.weights != wanted.weights:
            unlike.append("other weights")
        if self.samples != wanted.samples:
            unlike.append(f"{_counted(self.samples)} samples and not {_counted(wanted.samples)}")
        elif self.first != wanted.first:
            unlike.append("other data, as its first row shows")
        if unlike:
            raise ConfigError(
                f"The predictions in {folder} are of {', '.join(unlike)}.",
                hint="Name another folder, or begin this one anew with --fresh (fresh=True).",
            )


def _counted(count: int | None) -> str:
    return "unknown" if count is None else f"{count:,}"
