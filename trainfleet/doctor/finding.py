"""What a check found: a fact, whether that is well, and the remedy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What is so, whether that is well, and what to do if not."""

    subject: str
    fact: str
    verdict: Literal["ok", "note", "no", "off"] = "ok"
    """`note`: it works, but not as well as it could; `no`: something does not work; `off`: not installed, no fault."""
    remedy: str = ""
    exit_code: int = 1
    """Of the command, where the verdict is `no`."""
    outlook: bool = False
    """True where this follows from other findings: a use that will work here, or not."""
