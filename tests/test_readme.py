"""The README's programs are those of examples/, and what it links to exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PROGRAMS = re.findall(r"<!-- (examples/\S+) -->\n```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize(("path", "program"), PROGRAMS, ids=[path for path, _ in PROGRAMS])
def test_a_program_is_the_one_that_is_tested(path: str, program: str) -> None:
    tested = (ROOT / path).read_text().split('"""', 2)[2].lstrip()
    assert program == tested


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", (ROOT / page).read_text())
    assert [link for link in links if not ((ROOT / page).parent / link).exists()] == []


def test_make_targets_that_are_named_exist() -> None:
    named = set(re.findall(r"`?make ([a-z]+)", README))
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert named <= targets | {"train"}
