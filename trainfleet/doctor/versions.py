"""Whether what is installed fits together: by the bounds in the metadata of trainfleet and of what it uses."""

from __future__ import annotations

import operator
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from itertools import zip_longest
from pathlib import Path

import trainfleet
from trainfleet.doctor.finding import Finding

FOR_DEVELOPERS = ("test", "check", "bench", "manifests")
"""Extras that nobody needs to train."""
_WATCHED = ("trainfleet", "torch", "numpy", "pyarrow")
"""Packages of which a second copy, or a file of that name, changes what a run computes or breaks it."""
_COMPARE = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Requirement:
    """A line of a distribution's metadata, such as `torch>=2.11; extra == "torch"`."""

    name: str
    bounds: tuple[tuple[str, str], ...]
    """Such as (">=", "2.11")."""
    extra: str | None = None
    marker: str = ""
    """What it depends on besides the extra, such as `python_version < "3.11"`."""

    @classmethod
    def parse(cls, text: str) -> Requirement:
        wanted, _, marker = text.partition(";")
        match = re.match(r"\s*([\w.-]+)(?:\[[^\]]*\])?\s*\(?([^)]*)", wanted)
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", marker)
        rest = re.sub(r"\s*(and\s+)?extra\s*==\s*['\"][\w-]+['\"]\s*", "", marker)
        bounds = re.findall(r"(>=|<=|==|!=|>|<)\s*([\w.*+!-]+)", match[2] if match else "")
        return cls(
            name=match[1] if match else text,
            bounds=tuple((sign, number) for sign, number in bounds if "*" not in number),
            extra=extra[1] if extra else None,
            marker=rest.strip(),
        )

    def admits(self, version: str) -> bool:
        """Whether the numbers of `version` lie within the bounds; what follows them (rc1, +cpu) is not looked at."""
        return all(_COMPARE[sign](*_padded(version, number)) for sign, number in self.bounds)

    def __str__(self) -> str:
        return self.name + ",".join(sign + number for sign, number in self.bounds)


def requirements(distribution: str = "trainfleet") -> list[Requirement]:
    """What its metadata asks for; nothing where it is only imported, not installed."""
    try:
        return [Requirement.parse(text) for text in metadata.requires(distribution) or []]
    except metadata.PackageNotFoundError:
        return []


def version_of(name: str) -> str | None:
    """Of an installed distribution."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check_versions(*, quick: bool = False) -> Iterator[Finding]:
    """Versions outside the bounds of trainfleet, then (unless `quick`) those outside of each other's."""
    ours = [each for each in requirements() if each.extra not in FOR_DEVELOPERS]
    if not ours:
        yield Finding(
            subject="versions",
            fact="not known: trainfleet is imported from a folder, but not installed, so its bounds are not told",
            verdict="note",
            remedy='pip install -e "FOLDER[torch,monitor,data]", where FOLDER holds its pyproject.toml',
        )
        return
    wrong = [finding for each in ours for finding in _check(each)]
    used = {each.name: each for each in ours if version_of(each.name) is not None}
    among = [finding for name in used if not quick for finding in _check_needs_of(name)]
    yield from wrong
    yield from among
    if not wrong and not among:
        told = ", ".join(f"{name} {version_of(name)}" for name in ("trainfleet", *sorted(used)) if name in _TOLD)
        yield Finding(subject="versions", fact=f"{len(used)} packages fit together: {told}")


_TOLD = ("trainfleet", "torch", "numpy", "pyarrow", "pydantic", "safetensors", "transformers", "deepspeed")


def _check(wanted: Requirement) -> Iterator[Finding]:
    """Of trainfleet's own; a missing extra is no fault."""
    version = version_of(wanted.name)
    command = f'pip install -U "trainfleet[{wanted.extra}]"' if wanted.extra else f'pip install -U "{wanted}"'
    if version is None:
        if wanted.extra is None and not wanted.marker:
            fact = f"{wanted.name} is missing, which trainfleet needs"
            yield Finding(subject="versions", fact=fact, verdict="no", remedy=command)
    elif not wanted.marker and not wanted.admits(version):
        fact = f"{wanted.name} is {version}, and trainfleet {version_of('trainfleet')} needs {wanted}"
        verdict = f" for its extra {wanted.extra}" if wanted.extra else ""
        yield Finding(subject="versions", fact=fact + verdict, verdict="no", remedy=command)


def _check_needs_of(name: str) -> Iterator[Finding]:
    """Where another package that we use asks for what is not there, as `pip check` would find."""
    for wanted in requirements(name):
        version = version_of(wanted.name) if wanted.extra is None and not wanted.marker else None
        if version is not None and not wanted.admits(version):
            yield Finding(
                subject="versions",
                fact=f"{name} {version_of(name)} needs {wanted}, but {version} is installed",
                verdict="note",
                remedy=f'pip install "{wanted}", or another {name}; `pip check` lists all such pairs',
            )


def check_copies(path: list[str] | None = None) -> Iterator[Finding]:
    """Packages that are there twice on `path` (sys.path): which one a process takes depends on where it starts."""
    folders = list(dict.fromkeys(Path(entry or ".").resolve() for entry in (sys.path if path is None else path)))
    for name in _WATCHED:
        places = [found for folder in folders if (found := _module(folder, name)) is not None]
        if name == "trainfleet":
            places = list(dict.fromkeys([Path(trainfleet.__file__).parent.resolve(), *places, *_installed_in()]))
        if len(places) > 1:
            first, *others = places
            yield Finding(
                subject="copies",
                fact=f"{name} is there {len(places)} times: {first} wins over {', '.join(map(str, others))}",
                verdict="note",
                remedy="Ranks and feeders that start elsewhere may take another copy. Look at PYTHONPATH and at where "
                f"you stand (`trainfleet` and `python -m` differ in that), or pip uninstall {name}.",
            )


def _module(folder: Path, name: str) -> Path | None:
    """The package or the file of that name in `folder`; a folder without code is none."""
    if (folder / name / "__init__.py").is_file():
        return folder / name
    return folder / f"{name}.py" if (folder / f"{name}.py").is_file() else None


def _installed_in() -> Iterator[Path]:
    """Where pip has put trainfleet, also as a link to somebody's working tree."""
    import json
    from urllib.parse import unquote, urlparse

    for distribution in metadata.distributions(name="trainfleet"):
        direct = distribution.read_text("direct_url.json")
        url = json.loads(direct).get("url", "") if direct else ""
        folder = Path(unquote(urlparse(url).path)) / "trainfleet" if url.startswith("file:") else None
        if folder is not None and (folder / "__init__.py").is_file():
            yield folder.resolve()


def _padded(version: str, bound: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Both as numbers, equally many: 2.11 and 2.11.0 are the same."""
    pairs = list(zip_longest(_numbers(version), _numbers(bound), fillvalue=0))
    return tuple(a for a, _ in pairs), tuple(b for _, b in pairs)


def _numbers(version: str) -> list[int]:
    match = re.match(r"\d+(?:\.\d+)*", version)
    return [int(number) for number in match[0].split(".")] if match else []
