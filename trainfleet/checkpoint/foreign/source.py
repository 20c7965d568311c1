"""Weights that others saved, of whatever kind: found by what a person names, and called as the plain module does."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from trainfleet.checkpoint.foreign import dcp, safetensors, torch_file
from trainfleet.checkpoint.foreign.pieces import ForeignArray
from trainfleet.checkpoint.names import MANIFEST
from trainfleet.errors import CheckpointError

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""What torch.compile, FSDP and its recomputation put into names, wherever a wrapped module stands."""
_PARALLEL = "module."
"""What DataParallel and DistributedDataParallel put before every name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Foreign:
    """Arrays by name, each to be read when it is wanted, and what is worth telling of how they were found."""

    arrays: tuple[ForeignArray, ...]
    remarks: list[str] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        return sum(array.num_bytes for array in self.arrays)


def is_foreign(place: Path) -> bool:
    """Whether `open_foreign` is for this: a file or a folder of one of the known kinds, and no checkpoint of ours."""
    if place.is_file():
        return place.suffix in (".safetensors", *TORCH_SUFFIXES)
    return place.is_dir() and not (place / MANIFEST).exists() and (_is_dcp(place) or any(place.glob("*.safetensors")))


def open_foreign(source: Path, *, strip: str | None = None, only: str | None = None) -> Foreign:
    """The arrays of a file or folder; CheckpointError if it is none of the known kinds, or damaged as far as is seen.

    `only` takes those whose names begin with it. `strip` is taken off the names that remain; without it, what
    wrappers of torch put there is.
    """
    if not source.exists():
        raise CheckpointError(f"There is no file or folder {source}.")
    found = _open_folder(source) if source.is_dir() else _open_file(source)
    arrays = [array for array in found.arrays if array.name.startswith(only or "")]
    if not arrays:
        said = f" whose names begin with {only!r}; there is {found.arrays[0].name}" if found.arrays else ""
        raise CheckpointError(f"{source} holds no arrays{said}.")
    names, remark = renamed([array.name for array in arrays], strip)
    remarks = [*found.remarks, *([remark] if remark else [])]
    return Foreign(arrays=tuple(replace(a, name=n) for a, n in zip(arrays, names)), remarks=remarks)


def renamed(names: Iterable[str], strip: str | None) -> tuple[list[str], str | None]:
    """The names without `strip`, or without what wrappers put there; and what was done, in words.

    CheckpointError where a name does not begin with `strip`, or two become one.
    """
    old = list(names)
    if strip is not None:
        if unlike := [name for name in old if not name.startswith(strip)]:
            raise CheckpointError(
                f"{unlike[0]} does not begin with {strip!r}, which is to be taken off all names.",
                hint=f"To leave such names out add --only {strip}",
            )
        new, taken = [name.removeprefix(strip) for name in old], [strip] if strip else []
    else:
        new, taken = _without_wrappers(old)
    if twins := [name for i, name in enumerate(new) if name in new[:i]] if len(set(new)) < len(new) else []:
        raise CheckpointError(f"Two arrays would both be called {twins[0]}; choose with --strip-prefix and --only.")
    if "" in new:
        raise CheckpointError(f"Without {strip!r} nothing would be left of a name.")
    return new, f"names without {', '.join(map(repr, taken))}" if taken else None


def _without_wrappers(old: list[str]) -> tuple[list[str], list[str]]:
    """The names without what wrappers put there, and what that was."""
    new = [".".join(part for part in name.split(".") if part not in WRAPPERS) for name in old]
    taken = [wrapper for wrapper in WRAPPERS if any(wrapper in name.split(".") for name in old)]
    if all(name.startswith(_PARALLEL) for name in new):
        return [name.removeprefix(_PARALLEL) for name in new], [_PARALLEL, *taken]
    return new, taken


def _open_folder(folder: Path) -> Foreign:
    if (folder / MANIFEST).exists():
        raise CheckpointError(f"{folder} is a checkpoint of trainfleet already; use it as it is.")
    if _is_dcp(folder):
        tensors, within = dcp.arrays_in_dcp(folder)
        return Foreign(arrays=tuple(tensors), remarks=_told(within, []))
    arrays = safetensors.arrays_in_folder(folder)
    if not arrays:
        raise CheckpointError(f"{folder} holds neither safetensors files nor a distributed checkpoint (.metadata).")
    return Foreign(arrays=tuple(arrays))


def _open_file(file: Path) -> Foreign:
    if file.suffix == ".safetensors":
        return Foreign(arrays=tuple(safetensors.arrays_in_file(file)))
    if file.suffix in TORCH_SUFFIXES:
        found = torch_file.arrays_in_torch_file(file)
        remarks = _told(found.within, found.others)
        remarks += [f"{name} is {first} under another name, and stored once" for name, first in found.tied.items()]
        return Foreign(arrays=tuple(found.arrays), remarks=remarks)
    raise CheckpointError(
        f"{file} is of no known kind: known are .safetensors, {', '.join(TORCH_SUFFIXES)}, folders of safetensors "
        "files, and folders of PyTorch's distributed checkpoints."
    )


def _is_dcp(folder: Path) -> bool:
    return (folder / dcp.METADATA).is_file()


def _told(within: str | None, others: list[str]) -> list[str]:
    remarks = [f"the tensors under {within!r}"] if within is not None else []
    if others:
        shown = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        remarks.append(f"left out, as no tensors among them: {shown}")
    return remarks
