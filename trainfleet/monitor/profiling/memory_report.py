"""Where the memory of a step went: by kind, by phase and by module; the peak and what held it; what grows."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainfleet.monitor.profiling.allocations import Range
from trainfleet.monitor.profiling.growth import Growth
from trainfleet.monitor.profiling.holdings import KINDS, Holding
from trainfleet.monitor.units import readable_bytes

MAX_POINTS = 2000
"""Of a timeline: more than a picture has columns."""
MODULE_KINDS = ("parameters", "gradients", "optimizer", "buffers", "activations")
"""What a table by module shows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeline:
    """Live bytes through a step, thinned so that every high point is kept."""

    seconds: tuple[float, ...]
    """Since the step began."""
    bytes: Mapping[str, tuple[int, ...]]
    """By kind, at these times."""
    phases: tuple[tuple[str, float, float], ...]
    """(name, begin, end) in seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryReport:
    """One step on one rank and one device. Bytes are those that torch's allocator gave out."""

    step: int
    rank: int
    device: str
    begin_bytes: int
    end_bytes: int
    peak_bytes: int
    peak_phase: str
    peak_holders: tuple[tuple[str, str, int], ...]
    """(kind, module, bytes) at the peak, the largest first."""
    phases: Mapping[str, Mapping[str, int]]
    """Bytes by kind at the fullest moment of each phase."""
    modules: Mapping[str, Mapping[str, int]]
    """Bytes by kind of each module without those inside it: activations where there are most of them, the others at
    the most that each held."""
    growth: Growth
    reserved_bytes: int = 0
    """What the allocator of a GPU held at its most, cache included; 0 on the CPU, where it keeps none."""
    allocator_peak_bytes: int | None = None
    """The peak as the allocator of a GPU counted it by itself."""
    other_device_bytes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """The peaks on other devices, such as the CPU beside a GPU."""
    timeline: Timeline

    @property
    def cache_bytes(self) -> int:
        """What the allocator of a GPU kept without need."""
        return max(0, self.reserved_bytes - self.peak_bytes)

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "cache_bytes": self.cache_bytes}

    def __str__(self) -> str:
        return "\n".join([*self.headlines(), "", *_phase_table(self), "", *_module_table(self.modules)])

    def headlines(self) -> Iterator[str]:
        """The few lines that matter."""
        holders = Counter[str]()
        for kind, _, size in self.peak_holders:
            holders[kind] += size
        held = ", ".join(f"{kind} {readable_bytes(size)}" for kind, size in holders.most_common(4) if size)
        yield f"peak {readable_bytes(self.peak_bytes)} in {self.peak_phase}: {held or 'nothing'}"
        for kind, module, size in self.peak_holders[:3]:
            yield f"  {readable_bytes(size):>7}  {kind} of {module or 'no module'}"
        yield f"before the step {readable_bytes(self.begin_bytes)}, after it {readable_bytes(self.end_bytes)}"
        if self.reserved_bytes:
            yield f"reserved {readable_bytes(self.reserved_bytes)}, of which cache {readable_bytes(self.cache_bytes)}"
        for device, size in self.other_device_bytes.items():
            yield f"on {device} at most {readable_bytes(size)}"
        yield from self.growth.in_words()


def report_of(
    found: Sequence[Holding], phases: Sequence[Range], *, begin: int, end: int, device: str, **more: Any
) -> MemoryReport:
    """The step from `begin` to `end`, in nanoseconds since 1970; `more` are further fields of MemoryReport."""
    here = [each for each in found if each.block.device == device]
    within = (p for p in phases if p.ended > begin and p.begun < end)
    inside = [Range(p.name, max(p.begun, begin), min(p.ended, end)) for p in within]
    sweep = _Sweep(here, inside, begin, end)
    at_peak = Counter[tuple[str, str]]()
    for each in here:
        if _lives(each, sweep.peak_at):
            for module, size in each.parts:
                at_peak[each.kind, module] += size
    others = {each.block.device for each in found} - {device}
    beside = {name: _Sweep([e for e in found if e.block.device == name], (), begin, end).peak for name in others}
    return MemoryReport(
        device=device,
        begin_bytes=sweep.begin_bytes,
        end_bytes=sweep.end_bytes,
        peak_bytes=sweep.peak,
        peak_phase=sweep.peak_phase,
        peak_holders=tuple((kind, module, size) for (kind, module), size in at_peak.most_common()),
        phases=sweep.phases,
        modules=_by_module(here, sweep.fullest, begin, end),
        other_device_bytes={name: size for name, size in sorted(beside.items()) if size},
        timeline=sweep.timeline(),
        **more,
    )


class _Sweep:
    """Goes once through what was given out and taken back, in the order of time."""

    def __init__(self, found: Sequence[Holding], phases: Sequence[Range], begin: int, end: int) -> None:
        self._begin, self._phases = begin, phases
        self._now = Counter[str]()
        self._points: list[tuple[int, int, dict[str, int]]] = []
        self.peak, self.peak_at, self.peak_phase = -1, begin, "other"
        self.phases: dict[str, dict[str, int]] = {}
        self.fullest: dict[str, tuple[int, int]] = {}
        """By kind its most bytes, and when."""
        edges: list[tuple[int, int, str, int, str]] = []
        for each in found:
            block = each.block
            if block.made <= begin:
                if _lives(each, begin):
                    self._now[each.kind] += block.size_bytes
            elif block.made <= end:
                edges.append((block.made, 1, each.kind, block.size_bytes, ""))
            if block.freed is not None and begin < block.freed <= end:
                edges.append((block.freed, 0, each.kind, -block.size_bytes, ""))
        edges += [(phase.begun, 2, "", 0, phase.name) for phase in phases]
        edges += [(phase.ended, -1, "", 0, "other") for phase in phases]
        self.begin_bytes = sum(self._now.values())
        self._go(sorted(edges, key=lambda edge: edge[:2]))
        self.end_bytes = sum(self._now.values())

    def _go(self, edges: Sequence[tuple[int, int, str, int, str]]) -> None:
        phase = "other"
        total = self.begin_bytes
        self._note(self._begin, total, phase)
        for at, _, kind, size, name in edges:
            phase = name or phase
            self._now[kind] += size
            total += size
            if size > 0 or (name and name != "other"):
                self._note(at, total, phase, kind)
            elif size:
                self._points.append((at, total, dict(self._now)))

    def _note(self, at: int, total: int, phase: str, kind: str = "") -> None:
        now = {kind: self._now[kind] for kind in KINDS if self._now[kind]}
        self._points.append((at, total, now))
        if total > self.peak:
            self.peak, self.peak_at, self.peak_phase = total, at, phase
        if total > sum(self.phases.get(phase, {}).values()) or phase not in self.phases:
            self.phases[phase] = now
        if kind and self._now[kind] > self.fullest.get(kind, (0, 0))[0]:
            self.fullest[kind] = self._now[kind], at

    def timeline(self) -> Timeline:
        stride = max(1, -(-len(self._points) // MAX_POINTS))
        groups = [self._points[i : i + stride] for i in range(0, len(self._points), stride)]
        kept = [max(group, key=lambda point: point[1]) for group in groups] + self._points[-1:]
        return Timeline(
            seconds=tuple((at - self._begin) / 1e9 for at, _, _ in kept),
            bytes={
                kind: tuple(now.get(kind, 0) for _, _, now in kept)
                for kind in KINDS
                if any(now.get(kind) for _, _, now in kept)
            },
            phases=tuple((p.name, (p.begun - self._begin) / 1e9, (p.ended - self._begin) / 1e9) for p in self._phases),
        )


def _lives(each: Holding, at: int) -> bool:
    return each.block.made <= at and (each.block.freed is None or each.block.freed > at)


def _by_module(
    found: Sequence[Holding], fullest: Mapping[str, tuple[int, int]], begin: int, end: int
) -> dict[str, dict[str, int]]:
    table: dict[str, Counter[str]] = defaultdict(Counter)
    for kind in MODULE_KINDS:
        at = fullest.get(kind, (0, begin))[1]
        for each in found:
            if each.kind == kind and _lives(each, at):
                for module, size in each.parts:
                    table[module][kind] += size
    return {module: dict(kinds) for module, kinds in sorted(table.items())}


def _phase_table(report: MemoryReport) -> list[str]:
    shown = [kind for kind in KINDS if any(kinds.get(kind) for kinds in report.phases.values())]
    rows = [["at the fullest moment of", *shown, "together"]]
    for phase, kinds in report.phases.items():
        sizes = [readable_bytes(kinds[kind]) if kinds.get(kind) else "" for kind in shown]
        rows.append([phase, *sizes, readable_bytes(sum(kinds.values()))])
    return aligned(rows)


def _module_table(modules: Mapping[str, Mapping[str, int]], *, limit: int = 24) -> list[str]:
    """Numbers in names are gathered: `blocks.*.norm` are those of all blocks. The largest rows, in order of size."""
    alike: dict[str, Counter[str]] = defaultdict(Counter)
    members = Counter[str]()
    for module, kinds in modules.items():
        pattern = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", module) or "(outside of modules)"
        members[pattern] += 1
        alike[pattern].update(kinds)
    shown = [kind for kind in MODULE_KINDS if any(kinds[kind] for kinds in alike.values())]
    order = sorted(alike, key=lambda name: -sum(alike[name].values()))
    rows = [["module", *shown, "together"]]
    for name in order[:limit]:
        sizes = [readable_bytes(alike[name][kind]) if alike[name][kind] else "" for kind in shown]
        count = f"  x{members[name]}" if members[name] > 1 else ""
        rows.append([name + count, *sizes, readable_bytes(sum(alike[name].values()))])
    if order[limit:]:
        rest = sum((alike[name] for name in order[limit:]), Counter[str]())
        sizes = [readable_bytes(rest[kind]) if rest[kind] else "" for kind in shown]
        rows.append([f"{len(order) - limit} more", *sizes, readable_bytes(sum(rest.values()))])
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join(f"{cell:>{width}}" if i else f"{cell:<{width}}" for i, (cell, width) in enumerate(zip(row, widths)))
        for row in rows
    ]
