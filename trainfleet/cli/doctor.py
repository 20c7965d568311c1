"""`trainfleet doctor`: what works on this machine, or on the way to another, what does not, and the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from trainfleet.errors import ConfigError

if TYPE_CHECKING:
    from trainfleet.doctor.finding import Finding

_MARKS = {"ok": "  ok ", "note": "note ", "no": "  NO "}


def doctor(
    what: list[str] | None = typer.Argument(
        None,
        help="Another host, by address or token; or `ports` of this one.",
        metavar="[HOST:PORT|TOKEN|ports [PORT]...]",
    ),
    as_json: bool = typer.Option(False, "--json", help="For programs: a list of findings."),
    quick: bool = typer.Option(False, "--quick", help="Leave out what needs torch to be loaded."),
    token: str | None = typer.Option(None, "--token", help="For HOST:PORT: what it printed, or a file that holds it."),
    ca: Path | None = typer.Option(None, "--ca", help="For HOST:PORT with certificates: the CA, as PEM."),
    certificate: Path | None = typer.Option(None, "--certificate", help="Ours, as PEM."),
    key: Path | None = typer.Option(None, "--key", help="Its key, as PEM."),
) -> None:
    """Say what works on this machine, and what does not.

    With an address or a token: whether the listener there can be reached and how fast, step by step. With `ports`:
    which are free here. Ends with 1 if something that a run needs does not work; where a step to another host fails,
    with the code of that error.
    """
    certificates = _certificates(ca, certificate, key)
    findings = []
    for finding in _findings(what or [], quick, token, certificates):
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
    raise typer.Exit(wrong[0].exit_code if wrong else 0)


def _findings(
    what: list[str], quick: bool, token: str | None, certificates: tuple[Path, Path, Path] | None
) -> Iterator[Finding]:
    if what[:1] == ["ports"]:
        from trainfleet.doctor.ports import check_ports

        return check_ports([_port(each) for each in what[1:]])
    if len(what) > 1:
        raise ConfigError(f"doctor looks at one address at a time, and was given {len(what)}: {' '.join(what)}.")
    if what:
        from trainfleet.doctor.network import check_peer

        return check_peer(what[0], token=token, certificates=certificates)
    if token or certificates:
        raise ConfigError("A token or certificates are for an address: trainfleet doctor HOST:PORT --token ...")
    return _of_this_machine(quick)


def _of_this_machine(quick: bool) -> Iterator[Finding]:
    from trainfleet.doctor.accelerators import check_torch
    from trainfleet.doctor.finding import Finding
    from trainfleet.doctor.machine import CHECKS

    for check in CHECKS if quick else (*CHECKS, check_torch):
        try:
            yield from check()
        except Exception as error:  # one check that fails must not hide the others
            fact = f"could not be checked: {type(error).__name__}: {error}"
            yield Finding(subject=check.__name__.removeprefix("check_"), fact=fact, verdict="note")


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise ConfigError(f"{text!r} is no port; write a number, such as 7700.")
    return int(text)


def _certificates(ca: Path | None, certificate: Path | None, key: Path | None) -> tuple[Path, Path, Path] | None:
    if ca is None and certificate is None and key is None:
        return None
    if ca is None or certificate is None or key is None:
        raise ConfigError("Certificates need all three: --ca, --certificate and --key.")
    return ca, certificate, key


def _show(finding: Finding) -> None:
    print(f"{_MARKS[finding.verdict]} {finding.subject:<14} {finding.fact}", flush=True)
    if finding.remedy:
        print(f"{'':20} -> {finding.remedy}", flush=True)
