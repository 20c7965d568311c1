"""Suspect: what one rank saw of a step that was run again, in a form that ranks can tell each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trainfleet.parallel.spread import Spread
from trainfleet.training.inspection.births import Birth, Frame, worst
from trainfleet.training.inspection.finding import Kind, Phase, named
from trainfleet.training.inspection.values import Lines, Values
from trainfleet.training.inspection.watch import Watch


@dataclass(frozen=True, kw_only=True, slots=True)
class Suspect:
    """The first thing on a rank that was not finite."""

    kind: Kind
    phase: Phase
    module: str | None
    tensor: str
    what: str
    values: Values
    lines: Lines
    micro_batch: int | None
    order: tuple[int, int, int]
    """Micro-batch, place of the stage in this phase, time: by it the suspects of several ranks are ranked."""
    around: tuple[str, ...] = ()
    """The modules whose own parameters and buffers its code may have used."""
    then: str = ""

    def to_plain(self) -> dict[str, Any]:
        return {**asdict(self), "values": self.values.to_plain(), "lines": [list(each) for each in self.lines.found]}

    @classmethod
    def from_plain(cls, told: Mapping[str, Any]) -> Suspect:
        lines = Lines(tuple((int(length), tuple(found)) for length, found in told["lines"]))
        order = (int(told["order"][0]), int(told["order"][1]), int(told["order"][2]))
        values = Values.from_plain(told["values"])
        return cls(**{**told, "values": values, "lines": lines, "order": order, "around": tuple(told["around"])})


def of_forward(watch: Watch, spread: Spread, count: int) -> Suspect | None:
    """What this rank's loss came from; on a rank without one, the first thing that nobody healed."""
    if watch.losses:
        symptom: Birth | None = watch.losses[0]
    elif spread.pipeline is not None:
        symptom = worst(watch.births)
    else:
        return None
    if symptom is None:
        return None
    root, first_nan = symptom.root, symptom.first_nan
    micro_batch = watch.micro_batch_of(root, count)
    kind, phase, what, around = _words(root)
    then = ""
    if first_nan is not None and first_nan is not root:
        then = f"What was infinite there became NaN in {_short(first_nan)}"
    stage = _stage_of(root.before or root.after or root.module, spread)
    return Suspect(
        kind=kind,
        phase=phase,
        module=None if kind == "batch" else root.module,
        tensor=root.tensor,
        what=what,
        values=root.values,
        lines=root.lines,
        micro_batch=micro_batch,
        order=(micro_batch if micro_batch is not None else count, stage, root.at),
        around=around,
        then=then,
    )


def _words(root: Birth) -> tuple[Kind, Phase, str, tuple[str, ...]]:
    holds = "NaN" if root.values.has_nan else "infinities"
    module = named(root.module)
    if root.place == "output":
        return (
            "module",
            "forward",
            f"{module} was given what is finite and gave {holds} in {root.tensor}",
            (root.module,),
        )
    if root.place == "code":
        inside = [each for each in (root.after, root.before) if each is not None]
        return (
            "code",
            "forward",
            f"The code of {module} made {holds}{_between(root.after, root.before)}; "
            "what it was given and what these modules gave was finite"
            if inside
            else f"The code of {module} made {holds}",
            (root.module, *inside),
        )
    if root.place == "loss":
        return "loss", "loss", f"The loss function was given what is finite and made {holds} in {root.tensor}", ()
    if root.place == "batch":
        return "batch", "data", f"The batch holds {holds} in {root.tensor.removeprefix('batch')}", ()
    return "batch", "data", f"The model was called with {holds} in {root.tensor}", ()


def _between(after: str | None, before: str | None) -> str:
    if after is not None and before is not None:
        return f" between {after} and {before}"
    return f" after {after}" if after is not None else f" before {before}" if before is not None else ""


def _short(birth: Birth) -> str:
    if birth.place == "code":
        return f"the code of {named(birth.module)}{_between(birth.after, birth.before)}"
    return "the loss function" if birth.place == "loss" else named(birth.module)


def of_backward(watch: Watch, spread: Spread, count: int) -> Suspect | None:
    """The first gradient of this rank that was not finite, and whose backward made it."""
    found = watch.gradient
    if found is None:
        return None
    claim, frame = found.claim, found.claim.frame
    holds = "NaN" if found.values.has_nan else "infinities"
    module = claim.module
    around: tuple[str, ...] = (claim.module,)
    first, last = _neighbours(frame)
    if claim.kind == "parameter":
        what = f"The backward of {named(module)} made {holds} in the gradient of its {claim.tensor}"
        tensor = f"the gradient of {claim.tensor}"
    elif claim.kind == "input":
        tensor = "the gradient of its input"
        where = f" before {first}" if first is not None else ""
        whose = f"the code of {named(module)}{where}" if first is not None else named(module)
        what = f"The backward of {whose} was given what is finite and made {holds} in {tensor}"
    elif claim.kind == "output" and frame is not None and frame.parent is not None:
        module, tensor = frame.parent.module, f"the gradient of what {claim.module} gave"
        what = f"The backward of the code of {named(module)}{_between(claim.module, last)} made {holds} in {tensor}"
        around = (module,)
    elif claim.kind == "output" and spread.pipeline is not None and claim.module:
        module, tensor = "", f"the gradient of what {claim.module} gave"
        what = f"The backward of the code after {claim.module} made {holds} in {tensor}"
    else:
        module, tensor, around = "", "the gradient of what it is given", ()
        what = f"The backward of the loss function made {holds} in {tensor}"
    if claim.kind != "parameter":
        what += "; all gradients before it in backward were finite"
    micro_batch = watch.micro_batch_of(frame or found, count)
    return Suspect(
        kind="backward",
        phase="backward",
        module=module if claim.kind != "loss" else None,
        tensor=tensor,
        what=what,
        values=found.values,
        lines=found.lines if claim.kind != "parameter" else Lines(()),
        micro_batch=micro_batch,
        order=(micro_batch if micro_batch is not None else count, -_stage_of(claim.module, spread), found.at),
        around=around,
        then=_forward_of(watch, claim.module),
    )


def _neighbours(frame: Frame | None) -> tuple[str | None, str | None]:
    """(the first module that a call has called, the one that its parent called next)."""
    if frame is None:
        return None, None
    first = frame.children[0] if frame.children else None
    siblings = frame.parent.children if frame.parent is not None else []
    return first, siblings[frame.index + 1] if frame.index + 1 < len(siblings) else None


def _forward_of(watch: Watch, module: str) -> str:
    """Whether forward had met something in `module` already, which did not reach the loss."""
    for birth in watch.births:
        if birth.module == module or birth.before == module or birth.after == module:
            return f"Its forward had made {birth.tensor} not finite, which did not reach the loss"
    return ""


def _stage_of(module: str, spread: Spread) -> int:
    if spread.pipeline is None:
        return 0
    homes = spread.pipeline.stages.homes
    return next((max(0, home) for leaf, home in homes.items() if f"{module}.".startswith(f"{leaf}.")), 0)


def first_of(suspects: Sequence[tuple[int, int, Suspect]]) -> tuple[int, int, Suspect]:
    """(rank, place in the data, suspect) of what came first; of several at one time that of the lowest rank."""
    return min(suspects, key=lambda each: (each[2].order, each[0]))
