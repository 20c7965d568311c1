"""Inspector: runs a step whose loss or gradient is not finite again, and finds the first module that made it so.

The phases: it is agreed (all ranks know the loss and the norm), the step is run again with every module watched, each
rank tells its suspect, the first of them is named with its samples, and what a replay needs is kept.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from trainfleet.batch import Batch, batch_size
from trainfleet.errors import DataError, PeerError
from trainfleet.events import StepEnded
from trainfleet.loss import LossSum
from trainfleet.mesh import Mesh
from trainfleet.parallel import Engine
from trainfleet.parallel.layout import piece_of
from trainfleet.parallel.spread import spread_of
from trainfleet.tracks import Tracks
from trainfleet.training.inspection.evidence import place_for, write_batches, write_finding
from trainfleet.training.inspection.fields import fields_of
from trainfleet.training.inspection.finding import MOST_SAMPLES, Finding, told_ranks
from trainfleet.training.inspection.held import Held, held_by
from trainfleet.training.inspection.suspect import Suspect, first_of, of_backward, of_forward
from trainfleet.training.inspection.values import is_sound, values_of
from trainfleet.training.inspection.watch import Watch
from trainfleet.training.watchers.before import Before
from trainfleet.training.watchers.watcher import UnderWay, Watcher

logger = logging.getLogger(__name__)

StepFunction: TypeAlias = Callable[[Engine, Sequence[Batch]], LossSum]

MOST_HUNTS = 3
"""In a run: a step under inspection takes the time of several."""


class Inspector(Watcher):
    """Explains steps that are not finite, at most MOST_HUNTS of them, and not two in a row.

        inspector = Inspector(Before(model), batches, clip_norm=1.0, folder=Path("runs/a"))
        Trainer(..., watchers=[inspector.before, inspector, ...])
        finding = inspector.explain(under_way)    # on all ranks, from a later watcher's `judge`

    `batches` is the stream that the Trainer draws from; one that knows which samples it gave (`taken`) is asked.
    Without `folder` nothing is written. Gradients, buffers and random numbers are afterwards what they were before.
    """

    def __init__(
        self,
        before: Before,
        batches: Iterable[Batch],
        *,
        clip_norm: float | None,
        folder: Path | None = None,
        step_fn: StepFunction | None = None,
    ) -> None:
        self.before, self._model = before, before.model
        self._batches, self._clip_norm, self._folder = batches, clip_norm, folder
        self._step_fn = step_fn or (lambda engine, micro_batches: engine.forward_backward(micro_batches))
        self._hunts = 0
        self._is_armed = True

    def end(self, ended: StepEnded) -> None:
        if math.isfinite(ended.loss) and (ended.grad_norm is None or math.isfinite(ended.grad_norm)):
            self._is_armed = True

    def explain(self, under_way: UnderWay) -> Finding | None:
        """What made the step not finite; None where it is, where an overflow of fp16 is the loss scale's business, or
        where enough was explained. A collective."""
        if not self._is_asked(under_way):
            return None
        self._hunts += 1
        self._is_armed = False
        return self.inspect(under_way)[0]

    def _is_asked(self, under_way: UnderWay) -> bool:
        if not self._is_armed or self._hunts >= MOST_HUNTS:
            return False
        return not math.isfinite(under_way.loss) or (
            under_way.loss_scale is None and not math.isfinite(under_way.grad_norm)
        )

    def inspect(self, under_way: UnderWay, *, tallies: bool = False) -> tuple[Finding | None, Watch]:
        """Run the step again under a Watch, whatever its loss; None where it was finite and is. A collective."""
        begun = time.perf_counter()
        engine = under_way.engine
        mesh: Mesh = spread_of(self._model).mesh
        remarks: list[str] = []
        with self.before.again():  # what this step has poisoned itself is no cause
            held = held_by(self._model, mesh)
        watch = Watch(self._model, tallies=tallies)
        loss, norm = self._run_again(under_way, watch, remarks)
        count = len(under_way.micro_batches) * engine.plan.microbatches
        is_finite = math.isfinite(loss) and math.isfinite(norm)
        was_finite = math.isfinite(under_way.loss) and math.isfinite(under_way.grad_norm)
        if is_finite and was_finite:
            return None, watch
        suspects = self._suspects(watch, under_way, count, in_forward=not math.isfinite(loss))
        if is_finite:
            finding = self._of_no_one(under_way, "not_again", _NOT_AGAIN)
        elif suspects:
            finding = self._of_suspect(under_way, suspects, held, mesh)
        else:
            finding = self._of_gradients(under_way, mesh)
        late = self.before.late()
        if late:
            remarks.append(f"{late[0]} was changed by this step and by none before it; the second run met it changed.")
        seconds = time.perf_counter() - begun
        finding = replace(finding, seconds=seconds, remarks=(*finding.remarks, *remarks))
        return self._kept(finding, under_way.micro_batches, mesh), watch

    def _run_again(self, under_way: UnderWay, watch: Watch, remarks: list[str]) -> tuple[float, float]:
        """(loss, norm) of the second run; gradients are afterwards those of the first, clipped as they were."""
        engine: Any = under_way.engine
        one_by_one = spread_of(self._model).mesh.world_size == 1
        loss_fn = engine.loss_fn
        with self.before.again() as is_compiled, Tracks(counts=False):
            try:
                with watch:
                    engine.loss_fn = watch.loss_function(loss_fn, one_by_one)
                    loss = self._step_fn(engine, under_way.micro_batches).mean
            except PeerError:
                raise
            except Exception as error:  # of torch, of user code that bears no hooks
                logger.warning("The step could not be run again under inspection: %s", error)
                remarks.append(f"It could not be run again under inspection: {type(error).__name__}: {error}.")
                loss = math.nan
            finally:
                engine.loss_fn = loss_fn
        if is_compiled:
            remarks.append("Compiled modules ran as they were written, for what is inside of them cannot be seen.")
        if remarks and loss != loss and "could not" in remarks[0]:
            with self.before.again(), Tracks(counts=False):
                loss = self._step_fn(engine, under_way.micro_batches).mean
        return loss, engine.clip(self._clip_norm)

    def _suspects(
        self, watch: Watch, under_way: UnderWay, count: int, *, in_forward: bool
    ) -> list[tuple[int, int, Suspect]]:
        """(rank, place in the data, what it saw first) of those that saw anything."""
        spread = spread_of(self._model)
        mine = (of_forward if in_forward else of_backward)(watch, spread, count)
        if mine is not None and mine.kind == "batch":
            mine = _with_field(mine, under_way)
        told = spread.mesh.world.exchange([spread.mesh.data_axes.rank, None if mine is None else mine.to_plain()])
        return [(rank, place, Suspect.from_plain(each)) for rank, (place, each) in enumerate(told) if each is not None]

    def _of_suspect(
        self, under_way: UnderWay, suspects: list[tuple[int, int, Suspect]], held: list[Held], mesh: Mesh
    ) -> Finding:
        rank, place, first = first_of(suspects)
        # Ranks that share a batch hand each other what they compute: who met it later got it from who met it first.
        ranks = tuple(at for at, its, each in suspects if its != place or each.order == first.order)
        found = next((each for each in held if each.is_used_by(first.around)), None)
        micro_batch, rows, samples, indices = self._samples_of(under_way, first, rank, mesh)
        common: dict[str, Any] = {
            "step": under_way.step,
            "rank": rank,
            "ranks": ranks,
            "loss": under_way.loss,
            "grad_norm": under_way.grad_norm,
            "micro_batch": micro_batch,
        }
        if found is not None:
            return Finding(
                kind=found.kind,
                phase="before",
                module=found.module,
                tensor=found.name,
                what=found.what(sum(each.kind == found.kind for each in held)),
                values=found.values,
                remarks=(f"It was met first where: {first.what}.",),
                **common,
            )
        remarks = (f"{first.then}.",) if first.then else ()
        return Finding(
            kind=first.kind,
            phase=first.phase,
            module=first.module,
            tensor=first.tensor,
            what=first.what + told_ranks(ranks, len(suspects) - len(ranks), mesh.world_size),
            values=first.values,
            rows=rows,
            samples=samples,
            indices=indices,
            remarks=remarks,
            **common,
        )

    def _samples_of(
        self, under_way: UnderWay, suspect: Suspect, rank: int, mesh: Mesh
    ) -> tuple[int | None, tuple[int, ...], tuple[str, ...], tuple[int, ...]]:
        """(micro-batch as the stream gave it, its rows, what stands in them, their indices), as that rank knows it."""
        told = mesh.world.exchange(self._own_samples(under_way, suspect) if mesh.world.rank == rank else None)[rank]
        micro_batch, rows, samples, indices = told
        return micro_batch, tuple(rows), tuple(samples), tuple(indices)

    def _own_samples(self, under_way: UnderWay, suspect: Suspect) -> list[Any]:
        parts = under_way.engine.plan.microbatches
        if suspect.micro_batch is None:
            return [None, [], [], []]
        number, part = divmod(suspect.micro_batch, parts)
        try:
            size = batch_size(under_way.micro_batches[number])
        except DataError:
            return [number, [], [], []]
        length = size // parts
        rows = suspect.lines.samples_of(length)
        if rows is None:
            rows = tuple(range(length))
        rows = tuple(part * length + row for row in rows)
        taken = getattr(self._batches, "taken", None)
        held = taken(len(under_way.micro_batches)) if taken is not None else []
        if len(held) != len(under_way.micro_batches) or len(held[number]) != size:
            return [number, rows, [], []]  # a stream that does not say, or a collate that makes rows of its own
        named = [held[number][row] for row in rows]
        indices = [each.index for each in named if each.index is not None]
        return [number, rows, [str(each) for each in named[:MOST_SAMPLES]], indices]

    def _of_gradients(self, under_way: UnderWay, mesh: Mesh) -> Finding:
        """No tensor of this step was seen to hold it: what the sum over micro-batches and ranks made, or the norm."""
        if not math.isfinite(under_way.loss):
            return self._of_no_one(under_way, "unseen", "The loss is not finite, and nothing that was looked at is not")
        mine = None
        largest: tuple[float, str] = (-1.0, "")
        for name, parameter in self._model.named_parameters():
            if parameter.grad is None:
                continue
            if not is_sound(parameter.grad):
                mine = mine or name
            elif piece_of(parameter.grad).numel():
                largest = max(largest, (float(piece_of(parameter.grad).abs().max()), name))
        told = mesh.world.exchange([mine, *largest])
        if summed := [each[0] for each in told if each[0] is not None]:
            what = f"Each gradient of {summed[0]} was finite, and their sum over micro-batches and ranks is not"
            return self._of_no_one(under_way, "exchange", what, tensor=summed[0])
        size, name = max((each[1], each[2]) for each in told)
        what = (
            f"Every element of the gradient is finite, and the sum of their squares is not; the largest, {size:.3g}, "
            f"is in the gradient of {name}"
        )
        return self._of_no_one(under_way, "norm", what, tensor=name)

    def _of_no_one(self, under_way: UnderWay, kind: Any, what: str, *, tensor: str = "") -> Finding:
        phase: Any = {"exchange": "exchange", "norm": "norm"}.get(kind, "forward")
        return Finding(
            step=under_way.step,
            kind=kind,
            phase=phase,
            rank=0,
            module=tensor.rpartition(".")[0] if tensor else None,
            tensor=f"the gradient of {tensor}" if tensor else "",
            what=what,
            loss=under_way.loss,
            grad_norm=under_way.grad_norm,
        )

    def _kept(self, finding: Finding, micro_batches: Sequence[Batch], mesh: Mesh) -> Finding:
        """With the place where it is kept, as the ranks that write found that they could."""
        if self._folder is None:
            return finding
        mine: list[str | None] = [None]
        place = place_for(self._folder, finding.step) if mesh.is_main or mesh.world.rank == finding.rank else None
        if place is not None:
            written = mesh.world.rank != finding.rank or write_batches(place, micro_batches)
            if mesh.is_main:
                written = write_finding(place, replace(finding, path=str(place))) and written
            mine = [str(place) if written else None]
        told = mesh.world.exchange(mine)
        return replace(finding, path=told[0][0])


def _with_field(suspect: Suspect, under_way: UnderWay) -> Suspect:
    """Of what the model was called with: which field of the batch it is, or that it was made on the way."""
    number = (suspect.micro_batch or 0) // under_way.engine.plan.microbatches
    fields = list(fields_of(under_way.micro_batches[number]))
    bad = [(label, tensor) for label, tensor in fields if not is_sound(tensor)]
    if not bad:
        return replace(
            suspect, what=f"{suspect.what}, which its batch does not: data.on_device made it, or what calls the model"
        )
    label, tensor = next((each for each in bad if values_of(each[1]).has_nan), bad[0])
    values = values_of(tensor)
    holds = "NaN" if values.has_nan else "infinities"
    what = f"The batch holds {holds} in {label or 'its array'}"
    return replace(suspect, tensor=f"batch{label}", what=what, values=values)


_NOT_AGAIN = (
    "Run again with the same parameters, batch and random numbers, the step was finite, so something else made it: "
    "a fault of the machine, or a state that the model or the loss keeps outside of parameters and buffers"
)
