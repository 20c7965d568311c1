"""`trainfleet doctor`: what works on this machine, what does not, and the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from trainfleet.cli.machine import Finding

_MARKS = {"ok": "  ok ", "note": "note ", "no": "  NO "}


def doctor(
    as_json: bool = typer.Option(False, "--json", help="For programs: a list of findings."),
    quick: bool = typer.Option(False, "--quick", help="Leave out what needs torch to be loaded."),
) -> None:
    """Say what works on this machine, and what does not.

    Ends with 1 if something that a run needs does not work.
    """
    findings = []
    for finding in _findings(quick):
        findings.append(finding)
        if not as_json:
            _show(finding)
    wrong = [finding for finding in findings if finding.verdict == "no"]
    if as_json:
        import dataclasses
        import json

        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    elif wrong:
        print(f"\nDoes not work: {', '.join(finding.subject for finding in wrong)}.")
    else:
        print("\nEverything that was tried works.")
    raise typer.Exit(1 if wrong else 0)


def _findings(quick: bool) -> Iterator[Finding]:
    from trainfleet.cli.accelerators import check_torch
    from trainfleet.cli.machine import CHECKS, Finding

    for check in CHECKS if quick else (*CHECKS, check_torch):
        try:
            yield from check()
        except Exception as error:  # one check that fails must not hide the others
            fact = f"could not be checked: {type(error).__name__}: {error}"
            yield Finding(subject=check.__name__.removeprefix("check_"), fact=fact, verdict="note")


def _show(finding: Finding) -> None:
    print(f"{_MARKS[finding.verdict]} {finding.subject:<14} {finding.fact}", flush=True)
    if finding.remedy:
        print(f"{'':20} -> {finding.remedy}", flush=True)
