"""NaN and infinities, planted in a small net at known places and for one known sample; and the hunt for them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from proof.rows import MARK, MARKED, SAMPLES, Net, Points, marked, squares
from proof.sentences import Reader, Sentences, reading_loss
from torch import Tensor, nn

from trainfleet.batch import Batch
from trainfleet.data import LocalBatches
from trainfleet.loss import LossSum
from trainfleet.mesh import Mesh
from trainfleet.parallel import parallelize
from trainfleet.parallel.layout import piece_of
from trainfleet.plan import Plan
from trainfleet.training.inspection import Finding, Inspector
from trainfleet.training.recipe import TrainConfig
from trainfleet.training.trainer import Trainer
from trainfleet.training.watchers.before import Before
from trainfleet.training.watchers.watcher import Judgement, UnderWay, Watcher

# what is planted


def _nan(hidden: Tensor) -> Tensor:
    return torch.where(marked(hidden), torch.nan, hidden)


class _BadBackward(torch.autograd.Function):
    """Gives what it is given; of the marked rows' gradients, NaN."""

    @staticmethod
    def forward(context: Any, hidden: Tensor, rows: Tensor) -> Tensor:
        context.save_for_backward(rows)
        return hidden.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Any:
        return torch.where(context.saved_tensors[0], torch.nan, gradient), None


def _behind(module: nn.Module, change: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Let `module` give change(what it was given, what it would give)."""
    forward = module.forward

    @functools.wraps(forward)
    def changed(hidden: Tensor) -> Tensor:
        return change(hidden, forward(hidden))

    module.forward = changed  # type: ignore[method-assign]


def _in_forward(name: str, model: nn.Module) -> None:
    _behind(model.get_submodule(name), lambda given, found: torch.where(marked(given), torch.nan, found))


def _overflow(name: str, model: Net) -> None:
    _behind(model.get_submodule(name), lambda given, found: torch.where(marked(given), found.abs() * 3e38 * 1e3, found))


def _in_backward(name: str, model: nn.Module) -> None:
    _behind(model.get_submodule(name), lambda given, found: _BadBackward.apply(found, marked(given)))


def _in_experts(name: str, model: nn.Module) -> None:
    """In what they make of the marked tokens, wherever the expert lies that makes it."""
    experts = model.get_submodule(name)
    forward = experts.forward

    @functools.wraps(forward)
    def changed(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        found = forward(hidden_states, top_k_index, top_k_weights)
        return torch.where(marked(hidden_states), torch.nan, found)

    experts.forward = changed  # type: ignore[method-assign]


def _in_code(model: Net) -> None:
    model.blocks[2].before = _nan  # type: ignore[assignment, union-attr]


def _in_code_backward(model: Net) -> None:
    """A length whose gradient at 0 is 0 / 0: the classic of losses and attention."""

    def before(hidden: Tensor) -> Tensor:
        rows = marked(hidden)
        still = torch.where(rows, 0 * hidden, hidden)
        return hidden + still.square().sum(-1, keepdim=True).sqrt() * 1e-3

    model.blocks[1].before = before  # type: ignore[assignment, union-attr]


def _bad_loss(output: Tensor, batch: Batch) -> LossSum:
    """The logarithm of a target that is 0, for the marked sample."""
    rows = batch["input"][:, 0] == MARK
    logs = torch.where(rows, 0.0, 1.0).log()
    return LossSum(squares(output, batch).total + (logs * batch["target"][:, 0]).sum(), len(output))


def _huge_loss(output: Tensor, batch: Batch) -> LossSum:
    """Gradients of 1e25, whose squares float32 cannot hold."""
    usual = squares(output, batch)
    return LossSum(usual.total * 1e25, usual.weight)


class BadSteps(torch.optim.AdamW):
    """Its second update breaks a number of one parameter."""

    broken: Tensor
    taken = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        self.taken += 1
        if self.taken == 2:
            with torch.no_grad():
                piece_of(self.broken).view(-1)[3] = torch.nan


class _BreaksBuffer(Watcher):
    """As a step would whose statistics went wrong: the third step meets it."""

    def __init__(self, model: Net) -> None:
        self._model = model

    def begin(self, step: int, micro_batches: Sequence[Batch]) -> None:
        if step == 3:
            self._model.statistics.mean[4] = torch.nan


@dataclass(frozen=True, kw_only=True)
class Plant:
    """Something that is not finite, and what a hunt for it has to say."""

    name: str
    kind: str
    module: str | None
    words: str = ""
    """That the sentence has in it."""
    net: Callable[[], nn.Module] = Net
    points: Callable[[], Any] = Points
    into: Callable[[Any], None] | None = None
    loss: Callable[[Any, Batch], Any] = squares
    breaks: str | None = None
    """The parameter that the optimizer breaks."""
    breaks_buffer: bool = False
    of_sample: bool = True
    """Whether it comes from the marked sample alone."""
    plan: Mapping[str, Any] = field(default_factory=dict)
    nproc: int = 1
    ranks: tuple[int, ...] = (0,)
    """That saw it."""


def _module(module: str, into: Callable[[str, Any], None], **settings: Any) -> Plant:
    return Plant(into=functools.partial(into, module), module=module, **settings)


def _reading(module: str, into: Callable[[str, Any], None], *, experts: int = 0, **settings: Any) -> Plant:
    """In a net that reads sequences."""
    return _module(
        module,
        into,
        net=functools.partial(Reader, experts),
        points=functools.partial(Sentences, SAMPLES, MARKED),
        loss=reading_loss,
        nproc=2,
        **settings,
    )


PLANTS = [
    _module("blocks.2.up", _in_forward, name="forward of a deep module", kind="module", words="blocks.2.up"),
    _module("blocks.1.up", _overflow, name="overflow first, NaN behind it", kind="module", words="infinities"),
    Plant(
        name="code between two modules",
        into=_in_code,
        kind="code",
        module="blocks.2",
        words="between blocks.2.norm and blocks.2.up",
    ),
    Plant(name="the loss function", loss=_bad_loss, kind="loss", module=""),
    _module("blocks.1.act", _in_backward, name="backward of an own function", kind="backward", words="blocks.1.act"),
    _module(
        "blocks.2.down", _in_backward, name="backward on a residual branch", kind="backward", words="blocks.2.down"
    ),
    Plant(
        name="square root of 0 in code, backward",
        into=_in_code_backward,
        kind="backward",
        module="blocks.1",
        words="between blocks.1.norm and blocks.1.up",
    ),
    Plant(
        name="the data of one sample",
        points=functools.partial(Points, broken=True),
        kind="batch",
        module=None,
        words="['input']",
    ),
    Plant(
        name="a parameter, by the optimizer",
        breaks="blocks.1.up.weight",
        kind="parameter",
        module="blocks.1.up",
        words="blocks.1.up.weight",
        of_sample=False,
    ),
    Plant(
        name="a buffer",
        breaks_buffer=True,
        kind="buffer",
        module="statistics",
        words="statistics.mean",
        of_sample=False,
    ),
    Plant(name="the norm alone", loss=_huge_loss, kind="norm", module="head", words="head", of_sample=False),
    _module(
        "blocks.2.up", _in_forward, name="one rank only, ZeRO-2", kind="module", plan={"zero": 2}, nproc=2, ranks=(1,)
    ),
    _module(
        "blocks.3.down",
        _in_backward,
        name="backward, one rank, ZeRO-3, recomputed",
        kind="backward",
        plan={"zero": 3, "recompute": "blocks"},
        nproc=2,
        ranks=(1,),
    ),
    _module(
        "blocks.3.up",
        _in_forward,
        name="the second stage of a pipeline",
        kind="module",
        plan={"pp": 2, "microbatches": 2},
        nproc=2,
        ranks=(1,),
    ),
    _module(
        "blocks.1.act",
        _in_backward,
        name="backward in the first stage",
        kind="backward",
        plan={"pp": 2, "microbatches": 2},
        nproc=2,
        ranks=(0,),
    ),
    _module(
        "blocks.1.norm",
        _in_forward,
        name="before a split layer, tp=2",
        kind="module",
        plan={"tp": 2},
        nproc=2,
        ranks=(0, 1),
    ),
    _reading(
        "layers.1.norm_after",
        _in_forward,
        name="one rank's piece of the sequence, cp=2",
        kind="module",
        plan={"cp": 2},
        words="on rank 1, from which it came to 1 other",
        ranks=(1,),
    ),
    _reading(
        "layers.1.norm",
        _in_backward,
        name="backward behind attention over ranks, cp=2",
        kind="backward",
        plan={"cp": 2},
        words="layers.1.norm",
        ranks=(1,),
    ),
    _reading(
        "layers.1.norm_after",
        _in_forward,
        name="before experts that are dealt out, ep=2",
        kind="module",
        plan={"ep": 2},
        experts=4,
        ranks=(1,),
    ),
    _reading(
        "layers.1.feed.experts",
        _in_experts,
        name="an expert of one rank, ep=2",
        kind="module",
        plan={"ep": 2},
        experts=4,
        ranks=(1,),
    ),
]


class Hunter(Watcher):
    """Asks for an explanation of the first step that is not finite, and ends the run there."""

    def __init__(self, inspector: Inspector) -> None:
        self._inspector = inspector
        self.finding: Finding | None = None

    def judge(self, under_way: UnderWay) -> Judgement | None:
        self.finding = self._inspector.explain(under_way)
        if self.finding is None:
            return None
        return Judgement(policy="stop", kind="loss_not_finite", what=self.finding.what)


def hunt(plant: Plant, *, steps: int = 8, folder: Path | None = None, precision: str = "fp32") -> Finding | None:
    """Train with the plant on this rank's mesh until it is met, and explain it; None where it never was."""
    plan = Plan(**{"precision": precision, **plant.plan})
    with Mesh.from_env(plan, device="cpu") as mesh:
        batches, trainer, hunter = trainer_of(plant, plan, mesh, folder)
        try:
            trainer.fit(steps)
        except Exception:
            if hunter.finding is None:
                raise
        finally:
            batches.close()
        return hunter.finding


def trainer_of(plant: Plant, plan: Plan, mesh: Mesh, folder: Path | None) -> tuple[LocalBatches, Trainer, Hunter]:
    torch.manual_seed(0)
    model: Any = plant.net()
    if plant.into is not None:
        plant.into(model)
    points = plant.points()
    batches = LocalBatches(points, size=8, rank=mesh.data_axes.rank, world_size=mesh.data_axes.size, seed=1)
    rows = [points[index] for index in range(8)]
    example = {name: torch.as_tensor(np.stack([row[name] for row in rows])) for name in rows[0]}
    model = parallelize(model, mesh, plan, example=example)
    if plant.breaks is not None:
        optimizer: Any = BadSteps(model.parameters(), lr=1e-3)
        optimizer.broken = model.get_parameter(plant.breaks)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    inspector = Inspector(Before(model), batches, clip_norm=1.0, folder=folder)
    hunter = Hunter(inspector)
    watchers = [*([_BreaksBuffer(model)] if plant.breaks_buffer else []), inspector.before, inspector, hunter]
    config = TrainConfig(check_replicas_every=None)
    trainer = Trainer(
        model, optimizer, plant.loss, batches, mesh=mesh, config=config, accumulation=2, watchers=watchers
    )
    return batches, trainer, hunter


def wrong_in(plant: Plant, finding: Finding | None) -> str | None:
    """What a hunt got wrong; None where all of it is right."""
    if finding is None:
        return "nothing was found"
    if (finding.kind, finding.module) != (plant.kind, plant.module):
        return f"it is said to be {finding.kind} of {finding.module!r}, not {plant.kind} of {plant.module!r}"
    if plant.words not in finding.what:
        return f"{plant.words!r} is not in {finding.what!r}"
    if plant.of_sample and finding.indices != (MARKED,):
        return f"the samples are said to be {finding.indices}"
    if plant.of_sample and finding.ranks != plant.ranks:
        return f"the ranks are said to be {finding.ranks}"
    return None


def hunt_numbered(number: int, folder: Path | None = None) -> Finding | None:
    """As one rank of those that `PLANTS[number]` wants."""
    return hunt(PLANTS[number], folder=folder)
