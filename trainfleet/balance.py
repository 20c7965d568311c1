"""Cut a line of costs into contiguous parts, the largest as small as can be."""

from __future__ import annotations

from collections.abc import Sequence


def cut(costs: Sequence[float], parts: int) -> list[range]:
    """The `parts` contiguous, non-empty ranges of `costs` whose largest sum is minimal.

    Dynamic programming over prefixes, O(parts * n²): exact; lines here are layers, not tokens.
    Raises ValueError when there are fewer costs than parts.
    """
    n = len(costs)
    if not 1 <= parts <= n:
        raise ValueError(f"{n} costs cannot be cut into {parts} non-empty parts.")
    prefix = [0.0]
    for cost in costs:
        prefix.append(prefix[-1] + cost)
    # best[k][i]: the smallest possible largest part when the first i costs make k parts
    best = [[float("inf")] * (n + 1) for _ in range(parts + 1)]
    start = [[0] * (n + 1) for _ in range(parts + 1)]
    best[0][0] = 0.0
    for k in range(1, parts + 1):
        for i in range(k, n + 1):
            for j in range(k - 1, i):
                largest = max(best[k - 1][j], prefix[i] - prefix[j])
                if largest < best[k][i]:
                    best[k][i], start[k][i] = largest, j
    ranges: list[range] = []
    end = n
    for k in range(parts, 0, -1):
        ranges.append(range(start[k][end], end))
        end = start[k][end]
    return ranges[::-1]
