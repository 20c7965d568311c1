"""Tables of figures: shown as they are made, kept as Markdown for people and JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from measuring.machine import machine

RESULTS = Path(__file__).parents[1] / "results"


@dataclass(kw_only=True)
class Table:
    """Rows of figures under one title."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[str | float | None]] = field(default_factory=list)
    """A float is rounded to three decimals for people, not for programs; None is a dash."""
    notes: Sequence[str] = ()

    def markdown(self) -> str:
        lines = [f"### {self.title}", "", _line(self.columns), "|" + "---|" * len(self.columns)]
        lines += [_line([_readable(value) for value in row]) for row in self.rows]
        lines += ["", *self.notes] if self.notes else []
        return "\n".join(lines)


@dataclass(kw_only=True)
class Report:
    """All tables of one script."""

    name: str
    """Of the script, and of the files."""
    summary: str
    tables: list[Table] = field(default_factory=list)
    _machine: dict[str, str] = field(default_factory=machine)

    def add(self, table: Table) -> None:
        """Show it, and keep it."""
        self.tables.append(table)
        print(table.markdown(), end="\n\n", flush=True)

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        facts = [f"- {name}: {value}" for name, value in self._machine.items()]
        tables = [table.markdown() for table in self.tables]
        text = "\n\n".join([f"# {self.name}", self.summary, "\n".join(facts), *tables])
        (folder / f"{self.name}.md").write_text(text + "\n")
        plain = {"name": self.name, "machine": self._machine, "tables": [asdict(table) for table in self.tables]}
        (folder / f"{self.name}.json").write_text(json.dumps(plain, indent=1) + "\n")
        print(f"Written to {folder / self.name}.md and .json")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _readable(value: str | float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.3f}" if isinstance(value, float) else str(value)
