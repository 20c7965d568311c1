"""The one command that every host of a run is given, and what can be checked of it before anything starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainfleet.errors import LaunchError

if TYPE_CHECKING:
    from trainfleet.training.recipe import Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """`trainfleet train`, as the launcher of each host's ranks."""

    recipe: str
    """Its path on every host."""
    nodes: int
    nproc_per_node: int
    overrides: tuple[str, ...] = ()
    max_restarts: int = 0
    resume: str | None = None
    program: tuple[str, ...] = ("trainfleet",)

    def __post_init__(self) -> None:
        for name in ("nodes", "nproc_per_node"):
            if getattr(self, name) < 1:
                raise LaunchError(f"{name} is {getattr(self, name)}; use 1 or more.")

    @property
    def world_size(self) -> int:
        return self.nodes * self.nproc_per_node

    def arguments(self, *, node_rank: int | str | None, rendezvous: str) -> list[str]:
        """The words of the command on the host of that number; None leaves the number to be added behind."""
        words = [*self.program, "train", self.recipe, *self.overrides]
        words += ["--nproc", str(self.nproc_per_node), "--nnodes", str(self.nodes), "--rendezvous", rendezvous]
        words += ["--max-restarts", str(self.max_restarts)]
        words += ["--resume", self.resume] if self.resume else []
        return words if node_rank is None else [*words, "--node-rank", str(node_rank)]


def check_command(recipe: Recipe, command: Command, *, code_is_here: bool = True) -> list[str]:
    """Raise what is wrong before anything is sent anywhere; remarks on what is allowed, but may not be meant.

    `code_is_here` is False where the model and the data can be imported on the hosts only.
    """
    if code_is_here:
        from trainfleet.training.dry_run import check

        check(recipe, command.world_size)
    else:
        recipe.batch.resolve(recipe.plan.data_ranks(command.world_size))
    return list(_remarks(recipe, command.nodes))


def _remarks(recipe: Recipe, nodes: int) -> Sequence[str]:
    remarks = []
    if recipe.checkpoint.every is None:
        remarks.append("checkpoint.every is null: what ends before its last step begins anew.")
    if nodes > 1:
        remarks.append(f"Checkpoints go to {recipe.checkpoint.folder or recipe.folder}; all {nodes} hosts must see it.")
    return remarks
