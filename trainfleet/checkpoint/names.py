"""How the files of a checkpoint are called.

    step-00000120/
        5f3a9c01d2e4.7-00001-of-00004.safetensors    the array bytes of rank 1
        5f3a9c01d2e4.7-00001-of-00004.json           its index: what they are, and the rest of its state
        5f3a9c01d2e4.7-00001-of-00004.failed         instead of both: why rank 1 could not store them
        5f3a9c01d2e4.7-with-model.safetensors        a further file of the checkpoint, such as an export
        manifest.json                                written last; without it there is no checkpoint

`5f3a9c01d2e4` is drawn once a run, `7` counts its saves: no two attempts at a step share a file name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MANIFEST = "manifest.json"
DATA, INDEX, FAILED = ".safetensors", ".json", ".failed"

_FOLDER = re.compile(r"step-(\d{8,})")
_FILE = re.compile(r"([0-9a-f]{12})\.(\d+)-(?:\d{5,}-of-\d{5,}(?:\.safetensors|\.json|\.failed)|with-.+)", re.DOTALL)


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One try of one run to save one step."""

    step: int
    run: str
    number: int
    """Saves of this run before and with this one."""
    world_size: int

    @property
    def folder(self) -> str:
        return folder_of(self.step)

    @property
    def prefix(self) -> str:
        return f"{self.folder}/{self.run}.{self.number}-"

    def stem(self, rank: int) -> str:
        """What the names of this rank's files begin with."""
        return f"{self.prefix}{rank:05d}-of-{self.world_size:05d}"

    def further(self, name: str) -> str:
        """The name of a further file, which whoever made it calls `name`."""
        return f"{self.prefix}with-{name}"

    def supersedes(self, file: str) -> bool:
        """Whether `file`, a name within a folder, is of an attempt that is over now that this one has begun."""
        match = _FILE.fullmatch(file)
        return match is not None and not (match[1] == self.run and int(match[2]) >= self.number)


def folder_of(step: int) -> str:
    return f"step-{step:08d}"


def step_of(folder: str) -> int | None:
    """The step whose folder is called so; None for a name of another kind."""
    match = _FOLDER.fullmatch(folder)
    step = int(match[1]) if match else None
    return step if step is not None and folder_of(step) == folder else None


def manifest_of(step: int) -> str:
    return f"{folder_of(step)}/{MANIFEST}"


def steps_and_files(names: list[str]) -> dict[int, list[str]]:
    """The files within each step's folder; names of other kinds are none of ours."""
    found: dict[int, list[str]] = {}
    for name in names:
        folder, _, file = name.partition("/")
        step = step_of(folder)
        if step is not None and file:
            found.setdefault(step, []).append(file)
    return found
