"""Restoring: the newest checkpoint that verifies on all ranks, agreed by them, or none."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from trainfleet.checkpoint.further import verify_further
from trainfleet.checkpoint.loading import Loading, refuse_misfits
from trainfleet.checkpoint.manifest import Manifest, read_indexes, read_manifest
from trainfleet.checkpoint.names import DATA, MANIFEST, folder_of, steps_and_files
from trainfleet.checkpoint.sealed import Damaged
from trainfleet.checkpoint.staging import state_of
from trainfleet.checkpoint.tree import decode
from trainfleet.comm.group import Group
from trainfleet.errors import CheckpointError, StoreError
from trainfleet.state import Stateful
from trainfleet.store import Store

logger = logging.getLogger(__name__)


class Restore:
    """One call of `Checkpointer.restore`; `place` says where a step is."""

    def __init__(
        self, store: Store, group: Group | None, place: Callable[[int], str], *, partial: bool, cast: bool
    ) -> None:
        self._store = store
        self._group = group
        self._place = place
        self._partial = partial
        self._cast = cast
        self._rank = group.rank if group else 0
        self._world_size = group.size if group else 1
        self.problems: list[str] = []
        self.damaged: list[int] = []
        """Steps that were tried and are not whole."""

    def run(self, step: int | None, statefuls: Mapping[str, Stateful]) -> int | None:
        templates = {name: state_of(name, stateful) for name, stateful in statefuls.items()}
        candidates = [step] if step is not None else self._candidates()
        for candidate in candidates:
            if self._restore_one(candidate, templates, statefuls):
                return int(candidate)
        if step is not None:
            raise CheckpointError(f"{self._place(step)} is not whole: {self._first_problems()}.")
        if candidates or self._exchange(self._rank == 0 and self._has_any())[0]:
            raise CheckpointError(
                f"Of the checkpoints in {self._store!r} none is whole: {self._first_problems()}.",
                hint="Repair or move them, or begin anew in another folder.",
            )
        return None

    def _has_any(self) -> bool:
        return any(MANIFEST in files for files in steps_and_files(self._store.names()).values())

    def _candidates(self) -> list[int]:
        """Steps to try, newest commit first, as rank 0 sees them."""
        found: list[Manifest] = []
        problems: list[str] = []
        failure: str | None = None
        try:
            for step in steps_and_files(self._store.names()) if self._rank == 0 else ():
                try:
                    found.append(read_manifest(self._store, step))
                except (Damaged, StoreError) as error:
                    problems.append(str(error))
        except (CheckpointError, StoreError) as error:
            failure = str(error)
        found.sort(key=lambda manifest: manifest.order, reverse=True)
        seen = self._exchange({"steps": [m.step for m in found], "problems": problems, "failure": failure})[0]
        if seen["failure"]:
            raise CheckpointError(f"Nothing was restored: {seen['failure']}")
        for problem in seen["problems"]:
            self._note(problem)
        return [int(step) for step in seen["steps"]]

    def _restore_one(self, step: int, templates: Mapping[str, Any], statefuls: Mapping[str, Stateful]) -> bool:
        """Plan and read on this rank, hear how the others fared, and apply only if all fared well."""
        loading: Loading | None = None
        failure: Exception | None = None
        verdict: dict[str, Any] = {"damage": [], "wrong": [], "surplus": [], "failure": None}
        try:
            manifest = read_manifest(self._store, step)
            loading = Loading(read_indexes(self._store, manifest), self._rank)
            loading.plan(templates, partial=self._partial, cast=self._cast)
            verdict |= {"wrong": loading.misfits.wrong, "surplus": loading.misfits.surplus}
            if not loading.misfits.wrong:
                loading.read(self._store, world_size=self._world_size)
                if problems := verify_further(self._store, manifest.files[self._rank :: self._world_size]):
                    raise Damaged("\n".join(problems))
        except (Damaged, StoreError) as error:
            verdict["damage"] = str(error).split("\n")
        except Exception as error:  # a rank that leaves here would leave the others waiting
            failure = error
            verdict["failure"] = f"{type(error).__name__}: {error}"
        verdicts = self._exchange(verdict)
        if failure is not None:
            raise failure
        for rank, other in enumerate(verdicts):
            if other["failure"]:
                raise CheckpointError(f"{self._place(step)} was not restored: rank {rank} failed: {other['failure']}")
        damage = sorted({text for other in verdicts for text in other["damage"]})
        if damage:
            self.damaged.append(step)
            for text in damage:
                self._note(text)
            return False
        surplus = set.intersection(*(set(other["surplus"]) for other in verdicts))
        wrong = {text: None for other in verdicts for text in other["wrong"]}
        refuse_misfits(list(wrong), sorted(surplus), self._place(step))
        assert loading is not None
        loading.apply(statefuls)
        self._note_remarks(step, loading.misfits.kept)
        return True

    def _note_remarks(self, step: int, kept: list[str]) -> None:
        if kept:
            self._note(
                f"{', '.join(kept)}: not stored for rank {self._rank}, because {folder_of(step)} was saved by fewer "
                "ranks; left as it is"
            )
        if self._rank == 0:
            for name in surplus_files(self._store, step):
                self._note(f"{name}: not part of the checkpoint, and not read")

    def _note(self, problem: str) -> None:
        if problem not in self.problems:
            self.problems.append(problem)
            logger.log(logging.DEBUG if self._rank else logging.WARNING, "Checkpoint: %s.", problem)

    def _first_problems(self) -> str:
        more = len(self.problems) - 5
        return "; ".join(self.problems[:5]) + (f"; and {more} more" if more > 0 else "")

    def _exchange(self, value: Any) -> list[Any]:
        return self._group.exchange(value) if self._group else [value]


def surplus_files(store: Store, step: int) -> list[str]:
    """Names in the folder of a step that are not part of its checkpoint."""
    manifest = read_manifest(store, step)
    listed = {f"{folder_of(step)}/{MANIFEST}", *(file.name for file in manifest.files)}
    for index in manifest.indexes:
        listed |= {index.name, index.name.removesuffix(".json") + DATA}
    return [name for name in store.names(folder_of(step) + "/") if name not in listed]


def read_metadata(store: Store, step: int) -> dict[str, Any]:
    try:
        metadata: dict[str, Any] = decode(read_manifest(store, step).metadata, "metadata")
    except Damaged as error:
        raise CheckpointError(f"{folder_of(step)} in {store!r} is not whole: {error}.") from error
    return metadata
