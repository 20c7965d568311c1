"""Numbers as a person reads them: bytes, durations, rates, losses."""

from __future__ import annotations

import math
from collections.abc import Mapping


def readable_bytes(count: float) -> str:
    """`412 MB`, `1.24 GB`: decimal units, as disks and the tools beside us count."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 999.5 or unit == "TB":
            digits = 2 if abs(count) < 10 and unit in ("GB", "TB") else 1 if abs(count) < 100 and unit == "GB" else 0
            return f"{count:.{digits}f} {unit}"
        count /= 1000
    raise AssertionError("unreachable: the last unit takes everything")


def readable_duration(seconds: float) -> str:
    """`0:42`, `3:12`, `1:02:03`, `2 d 03:04`; `?` where it is not known."""
    if not math.isfinite(seconds) or seconds < 0:
        return "?"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour:02}:{minute:02}"
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def readable_rate(per_second: float) -> str:
    """`12,345`, `48.2`, `0.531`: three digits are enough to see a change."""
    if not math.isfinite(per_second):
        return "?"
    if abs(per_second) >= 100:
        return f"{per_second:,.0f}"
    return f"{per_second:.1f}" if abs(per_second) >= 10 else f"{per_second:.3g}"


def readable_loss(loss: float) -> str:
    """Four decimals while that says something, else four significant digits."""
    return f"{loss:.4f}" if 0.001 <= abs(loss) < 1000 or loss == 0 else f"{loss:.4g}"


def readable_number(value: object) -> str:
    """A number of unknown kind: whole ones with separators, others with four significant digits."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or (value.is_integer() and abs(value) < 1e15):
        return f"{int(value):,}"
    return f"{value:,.1f}" if 100 <= abs(value) < 1e9 else readable_loss(value)


def percentages(shares: Mapping[str, float]) -> dict[str, int]:
    """Shares of a whole as whole percent that add up to 100: those cut off most are rounded up. Nothing of nothing."""
    whole = sum(shares.values())
    if whole <= 0.0:
        return {}
    exact = {name: 100 * share / whole for name, share in shares.items()}
    rounded = {name: int(percent) for name, percent in exact.items()}
    cut_most = sorted(exact, key=lambda name: rounded[name] - exact[name])
    for name in cut_most[: 100 - sum(rounded.values())]:
        rounded[name] += 1
    return rounded
