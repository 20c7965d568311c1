"""Held: parameters and buffers that were not finite before the step, on any rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from trainfleet.mesh import Mesh
from trainfleet.training.inspection.finding import named
from trainfleet.training.inspection.values import Values, is_number, is_sound, values_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """One of them."""

    kind: Literal["parameter", "buffer"]
    name: str
    aliases: tuple[str, ...]
    """All names that it has in the model; tied ones have several."""
    values: Values
    rank: int
    """The first that has a piece of it which is not finite."""

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]

    def is_used_by(self, modules: Sequence[str]) -> bool:
        """Whether one of the modules has it, or a module inside of them."""
        owners = [alias.rpartition(".")[0] for alias in self.aliases]
        return any(module == "" or f"{owner}.".startswith(f"{module}.") for module in modules for owner in owners)

    def what(self, count: int) -> str:
        others = f"; so were {count - 1} more" if count > 1 else ""
        holds = "NaN" if self.values.has_nan else "infinities"
        if self.kind == "parameter":
            return f"The parameter {self.name} held {holds} already: the update of the step before made them{others}"
        return f"The buffer {self.name} of {named(self.module)} held {holds} already: a step before left them{others}"


def held_by(model: nn.Module, mesh: Mesh) -> list[Held]:
    """All of them, in the order of the model. A collective."""
    parameters = [(name, each, "parameter") for name, each in model.named_parameters(remove_duplicate=False)]
    buffers = [(name, each, "buffer") for name, each in model.named_buffers(remove_duplicate=False)]
    aliases: dict[int, list[str]] = {}
    for name, each, _ in (*parameters, *buffers):
        aliases.setdefault(id(each), []).append(name)
    mine = []
    for name, each, kind in (*parameters, *buffers):
        if aliases[id(each)][0] != name or not is_number(each) or is_sound(each):
            continue
        values = values_of(each)
        if kind == "buffer" and values.is_minus_inf_alone:
            continue  # a mask
        mine.append([kind, name, aliases[id(each)], values.to_plain()])
    found: dict[str, Held] = {}
    for rank, told in enumerate(mesh.world.exchange(mine)):
        for kind, name, others, values in told:
            if name not in found:
                found[name] = Held(
                    kind=kind, name=name, aliases=tuple(others), values=Values.from_plain(values), rank=rank
                )
    return list(found.values())
