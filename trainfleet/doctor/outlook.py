"""What will work here and what not, of all that people do with trainfleet: it follows from what was found."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from trainfleet.doctor.finding import Finding
from trainfleet.doctor.versions import Requirement, requirements, version_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Use:
    """One thing that people do."""

    name: str
    needs: tuple[str, ...] = ()
    """Subjects of findings that must be there and well; one that ends in `*` stands for all that begin so."""
    extra: str | None = None
    """Of trainfleet: all of its packages."""
    program: str | None = None


USES = (
    Use(name="train in one process", needs=("Python", "torch", "disk")),
    Use(name="ranks on CPUs", needs=("torch", "loopback", "gloo x 2", "disk", "interface")),
    Use(name="GPUs", needs=("torch", "GPU", "GPU *", "CUDA")),
    Use(name="ranks on GPUs", needs=("torch", "GPU", "GPU *", "nccl x *", "loopback", "disk", "interface")),
    Use(name="feed other hosts", needs=("loopback",), extra="net"),
    Use(name="TLS on the wire", needs=("clock",), extra="net"),
    Use(name="tunnels by ngrok", extra="ngrok"),
    Use(name="Parquet, Arrow, images", extra="data"),
    Use(name="shards at URLs", extra="shards"),
    Use(name="TensorBoard, pictures", extra="monitor"),
    Use(name="Hugging Face", needs=("torch",), extra="hf"),
    Use(name="DeepSpeed", needs=("torch",), extra="deepspeed"),
    Use(name="NumPy over MPI", extra="mpi", program="mpiexec"),
    Use(name="JAX", extra="jax"),
    Use(name="Keras", extra="keras"),
    Use(name="Ray", extra="ray"),
)


def outlook(found: Iterable[Finding]) -> Iterator[Finding]:
    """A finding for each use: well, not installed (`off`), or prevented by what was found."""
    by_subject: dict[str, list[Finding]] = {}
    for finding in found:
        by_subject.setdefault(finding.subject, []).append(finding)
    extras = _extras()
    for use in USES:
        yield _judge(use, by_subject, extras.get(use.extra or "", []))


def _judge(use: Use, found: Mapping[str, list[Finding]], packages: list[Requirement]) -> Finding:
    # What the extra lacks comes first: to install it is the shortest way on.
    missing = [each.name for each in packages if version_of(each.name) is None]
    if use.extra and not packages:
        return _row(use, "off", "not known: trainfleet is imported, but not installed", "See `versions` above.")
    if missing:
        return _row(use, "off", f"{', '.join(missing)} missing", f'pip install "trainfleet[{use.extra}]"')
    if old := [each for each in packages if not each.admits(version_of(each.name) or "0")]:
        return _row(use, "no", f"too old for {', '.join(map(str, old))}", f'pip install -U "trainfleet[{use.extra}]"')
    if use.program and _program(use.program) is None:
        remedy = f'pip install --force-reinstall "trainfleet[{use.extra}]", or add its folder to PATH'
        return _row(use, "off", f"{use.program} is not on the PATH", remedy)
    gpus = [each for subject in ("GPU", "GPU *") for each in _matching(subject, found)]
    if "GPU *" in use.needs and all(each.subject == "GPU" and each.verdict != "no" for each in gpus):
        return _row(use, "off", "no GPU that torch can use", "")
    untried = []
    for subject in use.needs:
        findings = _matching(subject, found)
        if wrong := next((finding for finding in findings if finding.verdict == "no"), None):
            return _row(use, "no", f"{wrong.subject}: {wrong.fact}", wrong.remedy)
        if not findings and subject not in _ONLY_IF_WRONG:
            untried.append(subject)
    if untried:
        return _row(use, "note", f"not tried: {', '.join(untried)}", "trainfleet doctor, without --quick, tries it.")
    return _row(use, "ok", ", ".join(f"{each.name} {version_of(each.name)}" for each in packages) or "yes", "")


_ONLY_IF_WRONG = ("interface", "GPU")


def _matching(subject: str, found: Mapping[str, list[Finding]]) -> list[Finding]:
    if not subject.endswith("*"):
        return found.get(subject, [])
    return [each for name, findings in found.items() if name.startswith(subject[:-1]) for each in findings]


def _row(use: Use, verdict: str, fact: str, remedy: str) -> Finding:
    assert verdict in ("ok", "note", "no", "off")
    return Finding(subject=use.name, fact=fact, verdict=verdict, remedy=remedy, outlook=True)  # type: ignore[arg-type]


def _extras() -> dict[str, list[Requirement]]:
    extras: dict[str, list[Requirement]] = {}
    for wanted in requirements():
        if wanted.extra is not None and not wanted.marker.startswith("sys_platform == 'win"):
            extras.setdefault(wanted.extra, []).append(wanted)
    return extras


def _program(name: str) -> Path | None:
    """On the PATH, or beside this Python, where pip puts programs."""
    if (found := shutil.which(name)) is not None:
        return Path(found)
    beside = Path(sys.executable).parent / name
    return beside if beside.exists() else None
