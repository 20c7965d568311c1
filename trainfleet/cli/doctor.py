"""`trainfleet doctor`: what works on this machine, or on the way to another, what does not, and the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from trainfleet.errors import ConfigError

if TYPE_CHECKING:
    from trainfleet.doctor.finding import Finding

_MARKS = {"ok": "  ok ", "note": "note ", "no": "  NO ", "off": "  -  "}
_COLOURS = {"ok": "green", "note": "yellow", "no": "red", "off": "bright_black"}


def doctor(
    what: list[str] | None = typer.Argument(
        None,
        help="The folder of a run; another host, by address or token; or `ports` of this one. Nothing: this machine.",
        metavar="[RUN|HOST:PORT|TOKEN|ports [PORT]...]",
    ),
    as_json: bool = typer.Option(False, "--json", help="For programs: a list of findings."),
    quick: bool = typer.Option(False, "--quick", help="Leave out what needs torch to be loaded, and what takes long."),
    token: str | None = typer.Option(None, "--token", help="For HOST:PORT: what it printed, or a file that holds it."),
    ca: Path | None = typer.Option(None, "--ca", help="For HOST:PORT with certificates: the CA, as PEM."),
    certificate: Path | None = typer.Option(None, "--certificate", help="Ours, as PEM."),
    key: Path | None = typer.Option(None, "--key", help="Its key, as PEM."),
) -> None:
    """Say what works on this machine, or what limits a run; and the remedy.

    With the folder of a run: what it loses time and safety by, the most first, each with the setting to change. With
    an address or a token: whether the listener there can be reached and how fast, step by step. With `ports`: which
    are free here. Ends with 1 if something that a run needs does not work; where a step to another host fails, with
    the code of that error.
    """
    certificates = _certificates(ca, certificate, key)
    findings: list[Finding] = []
    for finding in _findings(what or [], quick, token, certificates):
        if not as_json:
            if finding.outlook and not any(each.outlook for each in findings):
                print("\nWhat will work here:")
            _show(finding)
        findings.append(finding)
    wrong = [finding for finding in findings if finding.verdict == "no" and not finding.outlook]
    if as_json:
        import dataclasses
        import json

        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    else:
        print("\n" + _last_line(findings, wrong, of_a_run=_is_run(what or [])))
    raise typer.Exit(wrong[0].exit_code if wrong else 0)


def _last_line(findings: list[Finding], wrong: list[Finding], *, of_a_run: bool) -> str:
    told = sum(finding.verdict != "ok" for finding in findings)
    if of_a_run:
        return "Turn the first one, run some steps, and ask again." if told else "Nothing stands out."
    if wrong:
        return f"Does not work: {', '.join(dict.fromkeys(finding.subject for finding in wrong))}."
    return "Everything that was tried works."


def _findings(
    what: list[str], quick: bool, token: str | None, certificates: tuple[Path, Path, Path] | None
) -> Iterator[Finding]:
    if what[:1] == ["ports"]:
        from trainfleet.doctor.ports import check_ports

        return check_ports([_port(each) for each in what[1:]])
    if len(what) > 1:
        raise ConfigError(f"doctor looks at one address at a time, and was given {len(what)}: {' '.join(what)}.")
    if _is_run(what):
        from trainfleet.doctor.run import examine_run

        return examine_run(Path(what[0]))
    if what:
        from trainfleet.doctor.network import check_peer

        return check_peer(what[0], token=token, certificates=certificates)
    if token or certificates:
        raise ConfigError("A token or certificates are for an address: trainfleet doctor HOST:PORT --token ...")
    from trainfleet.doctor.examination import examine_machine

    return examine_machine(quick=quick)


def _is_run(what: list[str]) -> bool:
    """A folder, or what can only be meant as one: addresses have no slash, tokens neither."""
    return len(what) == 1 and (Path(what[0]).expanduser().is_dir() or "/" in what[0].rstrip("/"))


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
    width = 24 if finding.outlook else 14
    mark = typer.style(_MARKS[finding.verdict], fg=_COLOURS[finding.verdict], bold=finding.verdict == "no")
    typer.echo(f"{mark} {finding.subject:<{width}} {finding.fact}")  # which takes colours away in a pipe
    if finding.remedy:
        typer.echo(f"{'':{width + 6}} -> {finding.remedy}")
